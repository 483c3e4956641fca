"""The command line: parse, call one function, print one result line. No codec logic.

Results go to stdout, everything else to stderr; exit codes are those of linic.errors, and 130 when interrupted.
One module a command, imported when it is asked for: `linic --help` loads neither numpy nor torch.
"""
import argparse
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

from linic.errors import LinicError

COMMANDS = {
    "encode": "picture -> .linic file",
    "decode": ".linic file -> picture",
    "info": "what a .linic file says about itself",
    "models": "the models installed here",
    "eval": "measure a folder of pictures by whole files",
    "train": "train a model from a recipe",
    "export": "turn a training run into a weight file",
    "bench": "time the parts",
    "doctor": "check this installation",
}
# A command module has `arguments(parser)` and `run(args) -> exit code`.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong usage raises SystemExit(2), as argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser_for(argv).parse_args(argv)
    if args.version:
        import linic
        print(f"linic {linic.__version__}")
        return 0
    if not args.command:
        parser_for([]).print_help(sys.stderr)
        return 2
    try:
        return args.run(args)
    except LinicError as error:
        if os.environ.get("LINIC_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"linic: {error_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("linic: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our stdout has gone; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The whole parser, but only the command that is asked for brings its module and arguments."""
    parser = argparse.ArgumentParser(prog="linic", description="A learned image codec.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if not is_here(name):
            continue
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == asked:
            module = importlib.import_module(f"linic.app.cli.{name}")
            module.arguments(command)
            command.set_defaults(run=module.run)
    return parser


def is_here(command: str) -> bool:
    """A command whose module this installation lacks is not offered."""
    return importlib.util.find_spec(f"linic.app.cli.{command}") is not None


def error_line(error: LinicError) -> str:
    """The message with the file it is about in front, once."""
    where, message = getattr(error, "where", None), str(error)
    return message if where is None or message.startswith(f"{where}:") else f"{where}: {message}"
