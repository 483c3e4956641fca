"""Pictures through whole files: round trips, sizes, rates, and files that are not right."""
import os
import random
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import linic
import small_models
from linic import codec, container, weights
from linic.errors import (
    Damaged,
    LatentsMismatch,
    LimitExceeded,
    ModelMissing,
    NotLinic,
    PictureError,
    Unsupported,
    UsageError,
)

PHOTO = Path(__file__).parents[2] / "examples" / "photo.png"


@pytest.fixture(scope="module")
def photo():
    return Image.open(PHOTO).convert("RGB")


@pytest.fixture(scope="module")
def small(photo):
    image = photo.crop((100, 100, 180, 170))
    return image, linic.encode(image, quality=30)


def psnr(a, b):
    mse = ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).mean()
    return 10 * np.log10(65025 / mse)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (63, 65), (64, 64), (129, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_any_size_comes_back_in_its_size_and_mode(photo, size, mode):
    image = photo.convert(mode).crop((40, 40, 40 + size[0], 40 + size[1]))
    back = linic.decode(linic.encode(image, quality=70))
    assert (back.size, back.mode) == (size, mode)
    assert psnr(image, back) > 24


def test_a_photograph_gets_small_and_comes_back_well(photo):
    data = linic.encode(photo, quality=50)
    assert len(data) < photo.width * photo.height * 3 / 20
    assert psnr(photo, linic.decode(data)) > 28


def test_bytes_and_psnr_grow_with_quality(photo):
    image = photo.crop((200, 100, 456, 356))
    points = [(len(data), psnr(image, linic.decode(data)))
              for data in (linic.encode(image, quality=q) for q in range(0, 101, 5))]
    assert all(a < b for a, b in zip(points, points[1:]))
    assert all(a[1] < b[1] for a, b in zip(points, points[1:]))


@pytest.mark.parametrize("quality", [0, 40, 100])
def test_a_file_costs_what_the_model_estimates(photo, quality):
    image = photo.crop((0, 0, 768, 512))
    model = linic.load("lalic-xs")
    model.set_bf16(codec._fast_bf16(torch.device("cpu")))
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        found = model(x, torch.tensor([float(quality)]))["likelihoods"]
    estimate = -sum(p.double().log2().sum().item() for p in found.values()) / 8
    assert abs(len(linic.encode(image, quality=quality)) - estimate) < 0.01 * estimate + 64


def test_the_same_picture_gives_the_same_bytes_and_pixels(small):
    image, data = small
    assert linic.encode(image, quality=30) == data
    assert linic.decode(data).tobytes() == linic.decode(data).tobytes()


def test_a_file_written_with_one_number_of_threads_decodes_with_another(small):
    data = small[1]
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            linic.decode(data)  # raises LatentsMismatch where the latents differ
    finally:
        torch.set_num_threads(threads)


def test_metadata_travels_unchanged(small, photo):
    image = photo.crop((0, 0, 64, 64))
    image.info = {"icc_profile": b"profile" * 20, "exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", "xmp": b"<x/>"}
    data = linic.encode(image, quality=10)
    back = linic.decode(data)
    assert {k: back.info[k] for k in image.info} == image.info
    assert linic.info(data)["metadata"] == {"ICCP": 140, "EXIF": len(image.info["exif"]), "XMP_": 4}


def test_a_header_takes_at_most_64_bytes(small):
    told = linic.info(small[1])
    assert told["bytes"] - told["payload"] <= 64
    assert told["model"] == "lalic-xs" and told["quality"] == [30] and told["arithmetic"] == "integers"


@pytest.mark.parametrize("quality", [-1, 101, 50.5, "50", True])
def test_a_quality_that_does_not_exist_is_a_usage_error(photo, quality):
    with pytest.raises(UsageError, match="0 to 100"):
        linic.encode(photo, quality=quality)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "1", "LA", "I;16", "F"])
def test_other_modes_are_refused_by_name(mode):
    with pytest.raises(PictureError, match=mode):
        linic.encode(Image.new(mode, (8, 8)))


def test_an_unknown_model_or_device_is_an_error_that_says_what_there_is(photo):
    with pytest.raises(ModelMissing, match="lalic-xs"):
        linic.encode(photo, model="lalic-xxl")
    with pytest.raises(UsageError, match="cpu"):
        linic.encode(photo, device="abacus")


def test_what_is_no_linic_file_is_told_apart():
    for data in (b"", b"\x89PNG\r\n\x1a\n" + bytes(40), b"hello"):
        with pytest.raises(NotLinic):
            linic.decode(data)


def test_a_file_cut_anywhere_is_refused_with_an_offset_inside_it(small):
    data = small[1]
    for n in range(len(data)):
        with pytest.raises(linic.DecodeError) as caught:
            linic.decode(data[:n])
        assert 0 <= caught.value.offset <= n


def test_two_thousand_mutations_give_one_typed_error_each_or_a_picture(small):
    rng, data = random.Random(7), small[1]
    for _ in range(2000):
        bad = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(bad))
            choice = rng.random()
            if choice < 0.6:
                bad[at] ^= 1 << rng.randrange(8)
            elif choice < 0.8:
                del bad[at]
            else:
                bad.insert(at, rng.randrange(256))
        try:
            linic.decode(bytes(bad), max_pixels=1 << 20)
        except linic.DecodeError as error:
            assert 0 <= error.offset <= len(bad)
        except ModelMissing:
            pass  # a file whose digest was hit names another model
        else:
            assert bytes(bad) == data


def test_damage_behind_good_container_checksums_is_found_by_the_coder_or_the_latents_checksum(small):
    rng, file = random.Random(8), container.parse(small[1])
    payload = file.tiles[0].payload
    found = set()
    for i in range(120):
        bad = bytearray(payload)
        if i % 3 == 0:
            bad = bytearray(rng.randbytes(rng.randrange(0, 2 * len(payload))))
        elif i % 3 == 1:
            bad = bad[: rng.randrange(len(bad))]
        else:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        data = container.build(replace(file, tiles=[replace(file.tiles[0], payload=bytes(bad))]))
        with pytest.raises((Damaged, LatentsMismatch)) as caught:
            linic.decode(data)
        found.add(type(caught.value))
        assert 0 <= caught.value.offset <= len(data)
    assert Damaged in found


def test_a_wrong_checksum_of_the_latents_is_a_mismatch_and_no_picture(small):
    file = container.parse(small[1])
    data = container.build(replace(file, tiles=[replace(file.tiles[0], checksum=file.tiles[0].checksum ^ 1)]))
    with pytest.raises(LatentsMismatch) as caught:
        linic.decode(data)
    assert caught.value.exit_code == 5


def test_a_size_beyond_the_callers_limit_is_refused_before_memory_is_taken(small):
    with pytest.raises(LimitExceeded, match="max_pixels"):
        linic.decode(small[1], max_pixels=1000)
    file = container.parse(small[1])
    huge = container.build(replace(file, width=1 << 20, height=1 << 20))
    with pytest.raises(LimitExceeded):
        linic.decode(huge)


def test_a_file_of_a_model_that_is_not_here_names_it(small):
    file = container.parse(small[1])
    data = container.build(replace(file, digest=bytes(8), model=2))
    with pytest.raises(ModelMissing, match=r"lalic-s .*0000000000000000.*LINIC_MODELS"):
        linic.decode(data)
    with pytest.raises(ModelMissing, match="digest"):
        linic.decode(data, model="lalic-xs")


def test_a_model_of_ones_own_codes_by_path_and_by_folder(tmp_path, monkeypatch, photo):
    torch.manual_seed(0)
    from linic.models import build

    model = build("lalic-xs").eval()
    model.init_klt(torch.rand(64, 64, 64, 3))
    weights.save(tmp_path / "mine.safetensors", model, {"name": "mine"})
    image = photo.crop((0, 0, 64, 64))
    data = linic.encode(image, quality=80, model=tmp_path / "mine.safetensors")
    assert linic.info(data)["model"] is None
    with pytest.raises(ModelMissing, match="LINIC_MODELS"):
        linic.decode(data)
    first = linic.decode(data, model=tmp_path / "mine.safetensors")
    monkeypatch.setenv("LINIC_MODELS", str(tmp_path))
    assert linic.decode(data).tobytes() == first.tobytes()
    assert linic.encode(image, quality=80, model="mine") == data


def test_a_model_without_a_program_codes_in_floats_and_its_files_say_so(tmp_path, photo):
    path = tmp_path / "floats.safetensors"
    weights.save(path, small_models.randomised(small_models.small("ablation-xs-column")), {"name": "floats"})
    data = linic.encode(photo.crop((0, 0, 70, 40)), quality=50, model=path)
    assert linic.info(data)["arithmetic"] == "float64"
    assert linic.decode(data, model=path).size == (70, 40)
    with pytest.raises(Unsupported, match="decode it to verify it"):
        codec.verify(data, path)


def test_a_file_that_claims_the_other_arithmetic_is_refused(small):
    claimed = replace(container.parse(small[1]), arithmetic=container.FLOAT64)
    with pytest.raises(Damaged, match="not that of lalic-xs"):
        linic.decode(container.build(claimed))
    with pytest.raises(Unsupported, match="floats"):
        codec.verify(container.build(claimed))


def test_verifying_gives_what_was_coded_or_the_same_errors_as_decoding(small):
    told = codec.verify(small[1])
    assert told["tiles"] == 1 and told["symbols"] == 8 * 8 * 256 and len(told["latents"]) == 64
    file = container.parse(small[1])
    with pytest.raises(LatentsMismatch):
        codec.verify(container.build(replace(file, tiles=[replace(file.tiles[0], checksum=1)])))
    with pytest.raises(ModelMissing):
        codec.verify(container.build(replace(file, digest=bytes(8))))


# Decompression bombs: a few bytes that claim much.


def claim(width, height, tiles_x=1, tiles_y=1, **more):
    """A file of that size, right in all else: the shipped model's digest, empty payloads."""
    tiles = [container.Tile(50, b"")] * (tiles_x * tiles_y)
    digest = b"" if more else weights.load_program("lalic-xs")[2]
    return container.build(container.Image(width, height, tiles, model=1, digest=digest, tiles_x=tiles_x,
                                           tiles_y=tiles_y, arithmetic=container.INTEGERS, **more))


BOMBS = {
    "all pixels there can be": (lambda: claim(1 << 24, 1 << 24), {}),
    "one row beyond the limit": (lambda: claim(1 << 24, 5), {}),
    "many tiles": (lambda: claim(1 << 14, 1 << 14, 256, 256), {}),
    "compact": (lambda: claim(1 << 16, 1 << 16, profile=container.COMPACT), {}),
    "a tile above 2048x2048": (lambda: claim(2049, 2048), {}),
    "a tile of the whole limit": (lambda: claim(1 << 13, 1 << 13), {}),
    "a compact tile": (lambda: claim(1 << 13, 1 << 13, profile=container.COMPACT), {}),
    "without a limit on pixels": (lambda: claim(1 << 24, 1 << 24), {"max_pixels": None}),
    "uneven tiles": (lambda: claim(1 << 13, 64 * 33, 3, 1), {}),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("reader", [linic.decode, codec.verify])
def test_a_file_that_claims_too_much_is_refused_before_memory_is_taken(name, reader):
    make, options = BOMBS[name]
    data = make()
    with pytest.raises(LimitExceeded):      # once before, so that the model itself is not counted
        reader(data, **options)
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded):
            reader(data, **options)
        assert tracemalloc.get_traced_memory()[1] < (64 << 20)
    finally:
        tracemalloc.stop()


def test_importing_linic_reading_info_and_help_load_neither_torch_nor_numpy(tmp_path, small):
    (tmp_path / "x.linic").write_bytes(small[1])
    code = (f"import linic, sys; linic.info(open({str(tmp_path / 'x.linic')!r}, 'rb').read()); linic.__version__; "
            "print([m for m in ('torch', 'numpy', 'PIL', 'safetensors') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_compact_file_has_a_header_of_eight_bytes_and_decodes_to_the_same_picture():
    image = Image.open(PHOTO).convert("RGB").crop((0, 0, 200, 130))
    full, compact = linic.encode(image, 30), linic.encode(image, 30, profile="compact")
    payload = linic.info(full)["payload"]
    assert len(compact) == payload + 8 and linic.info(compact)["profile"] == "compact"
    assert np.array_equal(np.asarray(linic.decode(compact)), np.asarray(linic.decode(full)))
    with pytest.raises(linic.UsageError, match="mode L"):
        linic.encode(image.convert("L"), 30, profile="compact")


@pytest.mark.parametrize("settings, most", [({"LINIC_BF16": "0", "LINIC_NO_NATIVE": "1"}, 1), ({"LINIC_BF16": "1"}, 2)])
def test_pixels_differ_little_between_ways_to_compute_them(tmp_path, settings, most):
    """The synthesis is a float network; docs/determinism.md has what was measured (one level)."""
    file = tmp_path / "p.linic"
    file.write_bytes(linic.encode(Image.open(PHOTO).convert("RGB").crop((0, 0, 320, 256)), 80))
    shown = []
    for environment in ({"LINIC_BF16": "0"}, settings):
        out = tmp_path / f"{len(shown)}.png"
        subprocess.run([sys.executable, "-m", "linic", "decode", str(file), str(out)], check=True, timeout=120,
                       env={**os.environ, **environment}, capture_output=True)
        shown.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(shown[0] - shown[1]).max() <= most


def test_a_wide_picture_is_coded_in_tiles_and_shows_no_seam(photo):
    wide = photo.resize((2304, 128))
    data = linic.encode(wide, 60)
    facts = linic.info(data)
    assert facts["tiles"] == [2, 1] and len(facts["quality"]) == 2
    assert linic.verify(data)["tiles"] == 2
    error = np.abs(np.asarray(linic.decode(data)).astype(int) - np.asarray(wide)).mean((0, 2))
    seam = error[1152 - 8:1152 + 8].mean()
    assert seam < 2 * error.mean()


def test_a_model_code_stands_for_one_digest(photo):
    assert weights.load("lalic-xs").digest.hex() == container.FROZEN[1]
    assert container.model_code(bytes(8)) == 0
    tiny = Path(__file__).parents[1] / "golden" / "tiny.safetensors"
    with pytest.raises(UsageError, match="unregistered"):
        linic.encode(photo.crop((0, 0, 64, 64)), 30, model=tiny, profile="compact")
