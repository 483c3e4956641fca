"""Every error that linic raises on purpose, and the exit code each one owns.

    LinicError                     1   something failed
    |- UsageError (ValueError)     2   the caller asked for something that does not exist
    |  |- PictureError             2   a picture linic does not take (mode, size)
    |  |  `- UnreadablePicture     3   a picture file that is damaged or none at all
    |  `- RecipeError              2   a training recipe that is not right
    |- BackendMissing              2   a kernel or library that was asked for is not here
    |- DecodeError (ValueError)    3   the data is not a good linic file; has the byte offset
    |  |- NotLinic                 3   no linic signature
    |  |- Truncated                3   the data ends too early
    |  |- Damaged                  3   a checksum or a rule of the format is broken
    |  |- Unsupported              3   a newer version, an unknown critical chunk
    |  |- LimitExceeded            3   larger than the caller allows
    |  `- LatentsMismatch          5   the symbols decoded to other latents than the encoder had
    |- WeightsError (ValueError)   3   a weight file that is not right
    `- ModelMissing                4   the model a file names is not installed

A message says what is wrong, where, and what to do. Handling belongs to the callers.
"""


class LinicError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(LinicError, ValueError):
    exit_code = 2


class PictureError(UsageError):
    pass


class UnreadablePicture(PictureError):
    exit_code = 3


class RecipeError(UsageError):
    pass


class BackendMissing(LinicError):
    exit_code = 2


class DecodeError(LinicError, ValueError):
    """`offset`: byte of the file at which the trouble was found."""

    exit_code = 3

    def __init__(self, offset: int, message: str):
        super().__init__(f"byte {offset}: {message}")
        self.offset = offset


class NotLinic(DecodeError):
    pass


class Truncated(DecodeError):
    pass


class Damaged(DecodeError):
    pass


class Unsupported(DecodeError):
    pass


class LimitExceeded(DecodeError):
    pass


class LatentsMismatch(DecodeError):
    exit_code = 5


class WeightsError(LinicError, ValueError):
    exit_code = 3


class ModelMissing(LinicError):
    exit_code = 4
