"""Extreme files, by a model that has learnt nothing: round trips, damage, targets, notes, realism."""
import io
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import linic
import mrt_files
from linic import codec, container, weights
from linic.entropy.steps import Numpy
from linic.entropy.walk import walk
from linic.errors import (
    DecodeError,
    LatentsMismatch,
    LimitExceeded,
    ModelMissing,
    PictureError,
    Unsupported,
    UsageError,
)
from linic.picture.files import to_bytes
from linic.rangecoder import Encoder

PHOTO = Path(__file__).parents[2] / "examples" / "photo.png"
SIZES = [(1, 1), (31, 33), (300, 200), (700, 90), (2100, 40)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """mrt-xs in a folder that LINIC_MODELS names, and its digest under the code that mrt-xs will have."""
    folder = tmp_path_factory.mktemp("models")
    path = mrt_files.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINIC_MODELS", str(folder))
        patch.setitem(container.FROZEN, 17, weights.read_card(path)["digest"])
        yield path


@pytest.fixture(scope="module")
def photo():
    return Image.open(PHOTO).convert("RGB")


@pytest.fixture(scope="module")
def small(photo, installed):
    image = photo.resize((120, 80))
    return image, linic.encode(image, 50, extreme=True)


def psnr(a, b):
    return 10 * np.log10(65025 / (1e-9 + ((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean()))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_any_size_comes_back_in_its_size_and_mode(installed, photo, size, mode):
    image = photo.resize(size).convert(mode)
    data = linic.encode(image, extreme=True)
    told, back = linic.info(data), linic.decode(data, realism=0)
    assert (back.size, back.mode) == (size, mode) and told["model"] == "mrt-xs" and told["quality"][0] == 50
    assert psnr(image, back) > 12
    one = mode == "RGB" and size[0] <= 2048
    assert told["profile"] == ("compact" if one else "full")
    assert len(data) == told["payload"] + 8 if one else len(data) <= told["payload"] + 130
    verified = codec.verify(data)
    assert verified["symbols"] == 16 * -(-size[0] // 32) * -(-size[1] // 32)
    assert verified["tiles"] == (2 if size[0] > 2048 else 1)


@pytest.mark.parametrize("size", [(2112, 33), (2079, 1), (65, 4100)], ids=str)
def test_a_last_tile_of_one_cell_of_32_pixels_is_coded_like_others(installed, photo, size):
    image = photo.resize(size)
    data = linic.encode(image, 20, extreme=True)
    assert linic.decode(data).size == size and codec.verify(data)["tiles"] > 1


def test_the_same_picture_gives_the_same_bytes_by_any_number_of_threads(small):
    image, data = small
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert linic.encode(image, 50, extreme=True) == data
            linic.decode(data)
    finally:
        torch.set_num_threads(threads)


def test_bytes_and_psnr_grow_with_quality(installed, photo):
    image = photo.resize((256, 192))
    files = [linic.encode(image, q, extreme=True) for q in range(0, 101, 20)]
    assert all(len(a) < len(b) for a, b in zip(files, files[1:]))
    ends = [psnr(image, linic.decode(data, realism=0)) for data in (files[0], files[-1])]
    assert ends[0] + 1 < ends[1]


def test_compact_is_the_default_and_needs_no_metadata_to_be_shown_right(installed, photo):
    image = photo.resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # turned by a quarter
    image.info["exif"] = exif.tobytes()
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    compact, full = linic.encode(image, extreme=True), linic.encode(image, extreme=True, profile="full")
    told = linic.info(full)
    assert linic.info(compact)["profile"] == "compact" and told["profile"] == "full"
    assert set(told["metadata"]) == {"EXIF", "ICCP", "TEXT"} and (told["width"], told["height"]) == (96, 64)
    assert linic.decode(full).info["icc_profile"] == image.info["icc_profile"]
    upright = linic.decode(compact)
    assert upright.size == (64, 96) and not {"exif", "icc_profile"} & set(upright.info)
    assert compact == linic.encode(photo.resize((96, 64)).transpose(Image.Transpose.ROTATE_270), extreme=True)
    image.info["icc_profile"] = b"no profile"
    with pytest.raises(PictureError, match="full profile"):
        linic.encode(image, extreme=True)


def test_an_unregistered_model_codes_in_the_full_profile_and_says_that_it_invents(installed, photo, monkeypatch):
    monkeypatch.delitem(container.FROZEN, 17)
    data = linic.encode(photo.resize((64, 64)), extreme=True)
    told = linic.info(data)
    assert told["profile"] == "full" and told["model"] is None and told["note"] == container.NOTE
    assert linic.decode(data).info["linic"] == container.NOTE
    with pytest.raises(UsageError, match="unregistered"):
        linic.encode(photo.resize((64, 64)), extreme=True, profile="compact")


def test_the_note_is_in_info_in_the_picture_and_in_the_files_that_can_have_one(small, photo):
    assert "must not be used as evidence" in linic.info(small[1])["note"]
    picture = linic.decode(small[1])
    assert picture.info["linic"] == container.NOTE
    for suffix, key in ((".png", "Comment"), (".jpg", "comment")):
        data, lost = to_bytes(picture, suffix)
        found = Image.open(io.BytesIO(data)).info[key]
        assert (found.decode() if isinstance(found, bytes) else found) == container.NOTE and not lost
    assert to_bytes(picture, ".bmp")[1] == ["the note"]
    faithful = linic.encode(photo.resize((64, 64)), 10)
    assert "note" not in linic.info(faithful) and "linic" not in linic.decode(faithful).info


# Files that are not right.


def test_a_file_cut_anywhere_is_refused_with_an_offset_inside_it(installed, photo):
    image = photo.resize((40, 40))
    for profile in ("full", "compact"):
        data = linic.encode(image, 50, extreme=True, profile=profile)
        for n in range(len(data)):
            with pytest.raises(DecodeError) as caught:
                linic.decode(data[:n])
            assert 0 <= caught.value.offset <= n


def test_mutations_give_a_typed_error_or_a_picture(small):
    rng, kinds = random.Random(3), set()
    for i in range(150):
        bad = bytearray(small[1])
        at = rng.randrange(2, len(bad)) if i % 3 else rng.randrange(8, len(bad))
        bad[at] ^= 1 << rng.randrange(8)
        try:
            linic.decode(bytes(bad), max_pixels=1 << 16)
            kinds.add("picture")
        except DecodeError as error:
            assert 0 <= error.offset <= len(bad)
            kinds.add(type(error).__name__)
    assert {"Damaged", "LatentsMismatch"} <= kinds      # CRC-16 lets 1 in 65,536 through: no picture in these
    assert "picture" not in kinds


def test_a_file_of_one_family_is_refused_by_a_model_of_the_other(small, photo):
    faithful = linic.encode(photo.resize((70, 50)), 20)
    with pytest.raises(ModelMissing, match="digest"):
        linic.decode(faithful, model="mrt-xs")
    compact = linic.encode(photo.resize((70, 50)), 20, profile="compact")
    for data, model in ((compact, "mrt-xs"), (small[1], "lalic-xs")):       # compact files hold no digest
        for reader in (linic.decode, codec.verify):
            with pytest.raises((DecodeError, LatentsMismatch)):
                reader(data, model=model)


def test_a_file_whose_code_stands_for_no_model_yet_names_it(small, monkeypatch):
    data = bytearray(small[1])
    data[1] = 18
    with pytest.raises(ModelMissing, match="mrt-s "):
        linic.decode(bytes(data))


@pytest.mark.parametrize("size", [(2049, 2048), (8192, 8192), (2049, 1)], ids=str)
@pytest.mark.parametrize("profile", ["full", "compact"])
def test_a_tile_above_2048x2048_is_refused_before_memory_is_taken(installed, size, profile):
    digest = bytes.fromhex(container.FROZEN[17]) if profile == "full" else b""
    data = container.build(container.Image(*size, [container.Tile(50, b"")], model=17, digest=digest, arithmetic=1,
                                           profile=profile))
    for reader in (linic.decode, codec.verify):
        with pytest.raises(LimitExceeded, match="2048x2048"):
            reader(data)


def test_a_file_that_claims_float_arithmetic_is_refused(installed, photo):
    data = linic.encode(photo.resize((64, 64)), extreme=True, profile="full")
    claimed = container.build(replace(container.parse(data), arithmetic=container.FLOAT64))
    with pytest.raises(DecodeError, match="not that of mrt-xs"):
        linic.decode(claimed)
    with pytest.raises(Unsupported, match="floats"):
        codec.verify(claimed)


def test_any_symbols_make_a_picture_or_a_typed_error(installed):
    """Well coded and checked, but none that an encoder would choose: escapes, and far beyond what y can be."""
    program, tables, digest = weights.load_program(installed)
    rng = np.random.default_rng(5)

    class Coder:
        def __init__(self):
            self.coder = Encoder(tables)

        def code(self, index, symbols):
            made = (rng.standard_t(1, len(index)) * 100).clip(-16383, 16383).astype(np.int32)
            return self.coder.code(index, made)

    for size in ((1, 1), (100, 70)):
        file = container.Image(*size, [], model=17, digest=digest, arithmetic=container.INTEGERS)
        (rows, columns), = file.cells(32)
        coder = Coder()
        y_hat = walk(codec._plan_of(program, Numpy(program), 99, codec._size(rows, columns)), coder)
        file.tiles.append(container.Tile(99, coder.coder.finish(), file.checksum(0, codec._bytes(y_hat))))
        data = container.build(file)
        assert codec.verify(data)["symbols"] == y_hat.size and linic.decode(data).size == size


# Two decoders.


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A tiny model with two decoders, and the same stream with others alone."""
    folder = tmp_path_factory.mktemp("two")
    model = mrt_files.made(mrt_files.TINY)
    second = mrt_files.critic(model)
    weights.save(folder / "both.safetensors", model, {}, adversarial=second)
    mine = {key: value.clone() for key, value in model.state_dict().items()}
    for name, share in (("0", 0.0), ("half", 0.5), ("1", 1.0)):
        model.load_state_dict({key: mine[key].lerp(value, share) for key, value in second.items()}, strict=False)
        weights.save(folder / f"{name}.safetensors", model, {})
    return folder


def test_a_blend_is_the_decoder_between_the_two(two, photo):
    image = photo.resize((150, 100))
    both = two / "both.safetensors"
    data = linic.encode(image, 80, model=both)
    for realism, name in ((0, "0"), (0.5, "half"), (1, "1")):
        blended = linic.decode(data, model=both, realism=realism)
        alone = linic.decode(data, model=two / f"{name}.safetensors")
        # float16 of a mean is not the mean of float16, and shifts are blended after their kernels are merged.
        assert psnr(blended, alone) > (50 if realism == 0.5 else 60)
    assert psnr(linic.decode(data, model=both, realism=0), linic.decode(data, model=both, realism=1)) < 40
    assert linic.decode(data, model=both).tobytes() == linic.decode(data, model=both, realism=1.0).tobytes()


def test_a_second_decoder_does_not_change_digest_or_files(two, photo):
    cards = [weights.read_card(path) for path in sorted(two.iterdir())]
    assert len({card["digest"] for card in cards}) == 1 and len({card["checksum"] for card in cards}) == 4
    assert [card.get("decoders") for card in cards].count(["faithful", "adversarial"]) == 1
    image = photo.resize((64, 64))
    assert len({linic.encode(image, 40, model=path) for path in two.iterdir()}) == 1


@pytest.mark.parametrize("realism", [-0.1, 1.1, float("nan")])
def test_realism_outside_0_to_1_is_refused(two, photo, realism):
    data = linic.encode(photo.resize((64, 64)), model=two / "both.safetensors")
    with pytest.raises(UsageError, match="0 to 1"):
        linic.decode(data, model=two / "both.safetensors", realism=realism)


def test_realism_is_refused_where_there_is_no_second_decoder(two, photo):
    data = linic.encode(photo.resize((64, 64)), model=two / "0.safetensors")
    assert linic.decode(data, model=two / "0.safetensors", realism=0).size == (64, 64)
    with pytest.raises(UsageError, match="faithful decoder alone"):
        linic.decode(data, model=two / "0.safetensors", realism=0.5)
    with pytest.raises(UsageError, match="lalic-xs has one"):
        linic.decode(linic.encode(photo.resize((64, 64)), 10), realism=0)


# Targets.


@pytest.mark.parametrize("most", [45, 90, 250])
def test_a_size_is_met_by_the_best_quality_that_fits(installed, photo, most):
    image = photo.resize((256, 192))
    data = linic.encode(image, size=most)
    quality = linic.info(data)["quality"][0]
    assert len(data) <= most and linic.info(data)["model"] == "mrt-xs"
    assert quality == 100 or len(linic.encode(image, quality + 1, extreme=True)) > most


def test_a_size_that_a_quality_meets_to_the_byte_gives_that_quality(installed, photo):
    image = photo.resize((200, 130))
    for quality in (0, 37, 81):
        data = linic.encode(image, quality, extreme=True)
        found = linic.encode(image, size=len(data))
        assert len(found) <= len(data) and linic.info(found)["quality"][0] >= quality


def test_a_rate_chooses_the_family(installed, photo):
    image = photo.resize((256, 192))
    for bpp, model in ((0.025, "mrt-xs"), (0.5, "lalic-xs"), (0.1, "mrt-xs")):     # lalic-xs: .2 and more here
        told = linic.info(linic.encode(image, bpp=bpp))
        assert told["model"] == model and told["bpp"] <= bpp
    told = linic.info(linic.encode(image, bpp=0.5, extreme=True))
    assert told["model"] == "mrt-xs" and told["quality"] == [100]
    flat = Image.new("RGB", (512, 512), (120, 90, 60))
    assert linic.info(linic.encode(flat, bpp=0.1))["model"] == "lalic-xs"


def test_what_cannot_be_met_is_said_with_what_can(installed, photo):
    image = photo.resize((64, 64))
    with pytest.raises(UsageError, match=r"at most 5 bytes .* mrt-xs needs \d+"):
        linic.encode(image, size=5)
    with pytest.raises(UsageError, match="lalic-xs needs"):
        linic.encode(image, bpp=0.02, model="lalic-xs")
    for options in ({"quality": 3, "bpp": 0.1}, {"bpp": 0.1, "size": 9}, {"size": 0}, {"bpp": float("nan")},
                    {"bpp": float("inf")}, {"bpp": -1}):
        with pytest.raises(UsageError):
            linic.encode(image, **options)
    with pytest.raises(UsageError, match="extreme chooses the model"):
        linic.encode(image, extreme=True, model="lalic-xs")


def test_without_an_mrt_model_the_error_says_so(photo, monkeypatch, tmp_path):
    monkeypatch.setattr(weights.installed, "folders", lambda: [tmp_path, weights.SHIPPED])
    if any(m["name"] == codec.DEFAULT_EXTREME for m in weights.available()):
        pytest.skip("it ships")
    with pytest.raises(ModelMissing, match=r"MRT: no model 'mrt-xs'\. .*linic models add"):
        linic.encode(photo, bpp=0.02)
    with pytest.raises(ModelMissing, match="mrt-xs"):
        linic.encode(photo, extreme=True)
    assert linic.info(linic.encode(photo.resize((64, 64)), bpp=2))["model"] == "lalic-xs"


# Without torch.


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_verifying_needs_no_torch_and_info_not_even_numpy(small, installed, tmp_path):
    (tmp_path / "x.linic").write_bytes(small[1])
    read = f"data = open({str(tmp_path / 'x.linic')!r}, 'rb').read()"
    done = run(f"import sys; sys.modules['torch'] = None; import linic; {read}; "
               f"print(linic.verify(data, {str(installed)!r})['latents'])")
    assert done.stdout.strip() == codec.verify(small[1])["latents"], done.stderr
    done = run(f"import sys, linic; {read}; print(linic.info(data)['note']); "
               "print([m for m in ('torch', 'numpy', 'PIL', 'safetensors') if m in sys.modules])")
    assert done.stdout.splitlines() == [container.NOTE, "[]"], done.stderr
