import os
import stat
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from linic.errors import LinicError, PictureError
from linic.picture import FORMATS, attach, metadata, read, save, to_array, write_whole

PROFILE = b"not a real profile, but bytes" * 10
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">\xc3\xa9</x:xmpmeta>'


def picture(mode="RGB", size=(33, 21)):
    y, x = np.mgrid[0:size[1], 0:size[0]]
    array = np.stack([3 * x, 5 * y, x + y], axis=-1).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def exif_bytes():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: quarter turn
    return exif.tobytes()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".bmp", ".ppm"])
def test_a_lossless_format_gives_the_same_pixels_back(tmp_path, suffix):
    save(picture(), tmp_path / f"a{suffix}")
    assert (to_array(read(tmp_path / f"a{suffix}")) == to_array(picture())).all()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".pgm", ".jpg"])
def test_grey_stays_grey(tmp_path, suffix):
    save(picture("L"), tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}").mode == "L"


@pytest.mark.parametrize("suffix", [".jpg", ".avif"])
def test_a_lossy_format_gives_nearly_the_same_pixels_back(tmp_path, suffix):
    save(picture(), tmp_path / f"a{suffix}")
    error = to_array(read(tmp_path / f"a{suffix}")).astype(int) - to_array(picture())
    assert np.sqrt(np.mean(error**2)) < 4


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_profile_exif_and_xmp_travel_byte_for_byte(tmp_path, suffix):
    kept = {"icc_profile": PROFILE, "exif": exif_bytes(), "xmp": XMP}
    assert save(attach(picture(), kept), tmp_path / f"a{suffix}") == []
    found = metadata(read(tmp_path / f"a{suffix}"))
    assert found["icc_profile"] == PROFILE and found["xmp"] == XMP
    assert found["exif"].removeprefix(b"Exif\0\0") == kept["exif"].removeprefix(b"Exif\0\0")


def test_an_orientation_is_kept_and_never_applied(tmp_path):
    save(attach(picture(), {"exif": exif_bytes()}), tmp_path / "a.jpg")
    again = read(tmp_path / "a.jpg")
    assert again.size == picture().size and again.getexif()[0x0112] == 6


def test_metadata_a_format_cannot_carry_is_named(tmp_path):
    assert save(attach(picture(), {"icc_profile": PROFILE, "xmp": XMP}), tmp_path / "a.bmp") == ["icc_profile", "xmp"]


def test_xmp_that_is_no_utf8_is_lost_in_png_and_said_so(tmp_path):
    assert save(attach(picture(), {"xmp": b"\xff\xfe<"}), tmp_path / "a.png") == ["xmp"]
    assert save(attach(picture(), {"xmp": b"\xff\xfe<"}), tmp_path / "a.webp") == []


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(PictureError, match=r"\.xyz.*\.png"):
        save(picture(), tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_every_format_of_the_table_can_be_written_and_read(tmp_path):
    for suffix in FORMATS:
        save(picture("L" if suffix == ".pgm" else "RGB"), tmp_path / f"a{suffix}")
        assert read(tmp_path / f"a{suffix}").size == picture().size


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PictureError, match=r"gone\.png: no such file"):
        read(tmp_path / "gone.png")


def test_a_folder_and_a_text_file_are_not_pictures(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(PictureError, match=r"a\.png: not a picture"):
        read(tmp_path / "a.png")
    with pytest.raises(PictureError, match="directory"):
        read(tmp_path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp", ".ppm", ".avif"])
def test_a_file_cut_anywhere_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)  # pixels up to the file's end
    save(Image.fromarray(noise), tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    for cut in np.linspace(0, 0.9 * len(data), 12).astype(int):
        (tmp_path / f"b{suffix}").write_bytes(data[:cut])
        with pytest.raises(PictureError, match=f"b{suffix}: "):
            read(tmp_path / f"b{suffix}")


def test_a_picture_over_the_pixel_limit_is_refused(tmp_path, monkeypatch):
    save(picture(), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match="too many pixels"):
        read(tmp_path / "a.png")


def test_sixteen_bit_colour_is_refused_though_pillow_would_cut_it(tmp_path):
    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))
    row = b"\0" + b"\x12\x34" * 12
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b""))
    with pytest.raises(PictureError, match=r"deep\.png: 16 bits"):
        read(tmp_path / "deep.png")


def test_a_moving_picture_is_refused(tmp_path):
    picture().save(tmp_path / "a.webp", save_all=True, append_images=[Image.new("RGB", (33, 21))], lossless=True)
    with pytest.raises(PictureError, match="2 frames"):
        read(tmp_path / "a.webp")


def test_the_photograph_of_a_phone_file_with_further_pictures_is_read(tmp_path):
    picture().save(tmp_path / "a.mpo", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert read(tmp_path / "a.mpo").size == picture().size


def test_transparency_is_refused_with_the_path_in_front(tmp_path):
    picture("RGBA").save(tmp_path / "a.png")
    with pytest.raises(PictureError, match=r"a.png: mode RGBA .*background"):
        read(tmp_path / "a.png")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LinicError, match="no space left"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_writing_keeps_links_and_permissions(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("a")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_device_is_written_to_and_not_replaced():
    write_whole(os.devnull, b"new")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_missing_folder_is_an_error_about_the_output(tmp_path):
    with pytest.raises(LinicError, match="cannot be written: no such file"):
        write_whole(tmp_path / "none" / "a", b"new")


def test_a_note_is_the_comment_of_a_file_that_can_have_one_and_named_where_none_can(tmp_path):
    image = picture()
    image.info["linic"] = "a note"
    assert save(image, tmp_path / "a.png") == [] and read(tmp_path / "a.png").info["Comment"] == "a note"
    assert save(image, tmp_path / "a.jpg") == [] and read(tmp_path / "a.jpg").info["comment"] == b"a note"
    assert save(image, tmp_path / "a.ppm") == ["the note"]
    image.info["xmp"] = b"<x/>"
    save(image, tmp_path / "b.png")
    again = read(tmp_path / "b.png")
    assert again.info["Comment"] == "a note" and metadata(again) == {"xmp": b"<x/>"}
