import numpy as np
import pytest
from PIL import Image

from linic.errors import PictureError
from linic.picture import attach, crop, from_array, metadata, pad, to_array


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (64, 64), (33, 65)])
def test_colour_goes_to_an_array_and_back_unchanged(size):
    array = noise(*size)
    again = to_array(from_array(array, "RGB"))
    assert again.dtype == np.uint8 and (again == array).all()


@pytest.mark.parametrize("size", [(1, 1), (5, 3)])
def test_grey_is_repeated_into_three_channels_and_comes_back_as_grey(size):
    grey = noise(*size)[:, :, 0]
    image = Image.fromarray(grey)
    array = to_array(image)
    assert image.mode == "L" and array.shape == (*size, 3) and (array == grey[:, :, None]).all()
    back = from_array(array, "L")
    assert back.mode == "L" and (np.asarray(back) == grey).all()


def test_grey_of_three_different_channels_is_their_mean_rounded():
    array = noise(40, 40)
    exact = array.astype(float).mean(axis=2)
    assert (np.asarray(from_array(array, "L")) == np.floor(exact + 0.5)).all()


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "I;16", "LA", "1", "F", "I", "YCbCr", "HSV", "LAB", "PA"])
def test_another_mode_is_refused_by_name_with_a_way_to_convert_it(mode):
    with pytest.raises(PictureError, match=f"mode {mode} ") as caught:
        to_array(Image.new(mode, (4, 4)))
    assert "convert" in str(caught.value)


def test_a_transparent_colour_in_a_colour_picture_is_refused():
    image = Image.new("RGB", (4, 4))
    image.info["transparency"] = (0, 0, 0)
    with pytest.raises(PictureError, match="transparent"):
        to_array(image)


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_an_array_of_another_kind_is_refused(array):
    with pytest.raises(PictureError, match="uint8"):
        from_array(array)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (65, 63), (1, 130)])
def test_padding_repeats_the_last_row_and_column_and_crop_undoes_it(size):
    array = noise(*size)
    padded = pad(array, 64)
    assert padded.shape[0] % 64 == padded.shape[1] % 64 == 0
    assert padded.shape[0] - size[0] < 64 and padded.shape[1] - size[1] < 64
    assert (padded[size[0]:, :size[1]] == array[-1]).all()
    assert (padded[:, size[1]:] == padded[:, size[1] - 1:size[1]]).all()
    assert (crop(padded, *size) == array).all()


def test_cropping_to_more_than_there_is_is_refused():
    with pytest.raises(PictureError, match="cannot crop"):
        crop(noise(4, 4), 5, 4)


def test_metadata_is_attached_and_found_again_byte_for_byte():
    kept = {"icc_profile": b"\x00profile", "exif": b"Exif\x00\x00II*\x00", "xmp": b"<x:xmpmeta/>"}
    assert metadata(attach(Image.new("RGB", (2, 2)), kept)) == kept
    assert metadata(Image.new("RGB", (2, 2))) == {}


def test_unknown_metadata_is_refused():
    with pytest.raises(PictureError, match="iptc"):
        attach(Image.new("RGB", (2, 2)), {"iptc": b""})
