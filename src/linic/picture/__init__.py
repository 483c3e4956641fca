"""Picture files <-> Pillow images <-> arrays uint8 (H, W, 3) in 0..255. No networks, no torch.

    image = read("photo.png")            still, 8 bits a channel, any size from 1x1
    array = to_array(image)              grey is repeated into three channels; image.mode remembers it
    kept = metadata(image)               {"icc_profile": ..., "exif": ..., "xmp": ...}, bytes as they were
    padded = pad(array, 64)              by replication, right and bottom; crop() undoes it
    image = attach(from_array(array, mode), kept)
    image.info[NOTE] = "..."             a note: PNG and JPEG files carry it as their comment
    save(image, "copy.png")              whole file or none

Code values stay as they are: a colour profile and an EXIF orientation travel with them and are never applied, but by
`plain`, for files that leave metadata behind.
Raises PictureError for everything that linic would otherwise have to change silently.
"""
from linic.picture.arrays import NOTE, attach, check, crop, from_array, metadata, pad, plain, to_array
from linic.picture.files import FORMATS, read, save, write_whole

__all__ = ["FORMATS", "NOTE", "attach", "check", "crop", "from_array", "metadata", "pad", "plain", "read", "save",
           "to_array", "write_whole"]
