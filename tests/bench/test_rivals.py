import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linic.bench import rivals
from linic.bench.metrics import psnr
from linic.errors import UsageError

SHARED = Path(__file__).parents[3] / "shared"
needs_anchors = pytest.mark.skipif(not (SHARED / "anchors").is_dir(), reason="no anchors here")
needs_kodak = pytest.mark.skipif(not (SHARED / "data" / "kodak").is_dir(), reason="no Kodak here")


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    grains = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(grains).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("codec", rivals.codecs().values(), ids=lambda c: c.name)
def test_the_best_fit_is_within_the_bytes_and_full_size(codec):
    found = rivals.fit(picture(), codec, 700)
    assert found and found.bytes <= 700 and found.picture.size == (96, 64)
    assert rivals.fit(picture(), codec, 3) is None


@pytest.mark.parametrize("codec", rivals.codecs().values(), ids=lambda c: c.name)
def test_the_largest_quality_that_fits_is_found(codec):
    small = rivals.shrunk(picture(), 2)
    most = codec.count(codec.encode(small, 30))
    quality = rivals.largest(codec, small, most)
    assert quality >= 30 and codec.count(codec.encode(small, quality)) <= most
    assert quality == 95 or codec.count(codec.encode(small, quality + 1)) > most


def test_curves_of_whole_files_are_means_over_the_pictures(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        picture(seed=seed).save(path)
    curves = rivals.measured(paths)
    assert {"jpeg420"} <= curves.keys() <= {"jpeg420", "webp", "avif444_psnr"}
    jpeg = curves["jpeg420"]
    files = [rivals.codecs()["jpeg420"].encode(Image.open(path), 5) for path in paths]
    assert jpeg.bpp[0] == pytest.approx(sum(8 * len(data) / (96 * 64) for data in files) / 2)
    assert jpeg.psnr == tuple(sorted(jpeg.psnr)) and "Pillow" in jpeg.source


def test_a_known_answer_is_taken_only_where_it_fits():
    codec = rivals.codecs()["jpeg420"]
    known = rivals.fit(picture(), codec, 900, (2, 10))
    assert (known.scale, known.quality) == (2, 10)
    assert rivals.fit(picture(), codec, known.bytes - 1, (2, 10)).bytes < known.bytes


def test_of_avif_only_the_media_is_counted():
    box = (16).to_bytes(4) + b"ftyp" + b"12345678"
    media = (13).to_bytes(4) + b"mdat" + b"12345"
    assert rivals.media_bytes(box + media) == 5
    assert rivals.media_bytes(box + (0).to_bytes(4) + b"mdat" + b"1234567") == 7      # to the end of the file
    with pytest.raises(UsageError):
        rivals.media_bytes((3).to_bytes(4) + b"mdat" + b"12345")


@pytest.fixture
def folder(tmp_path):
    """Anchors of one picture: `coded` at half its size."""
    image, small = picture(), rivals.shrunk(picture(), 2)
    where = tmp_path / "vvc_extreme" / "0.0250"
    where.mkdir(parents=True)
    small.save(where / "one.webp", lossless=True)
    decoded = np.asarray(rivals.grown(small, image.size))
    entry = {"width": 96, "height": 64, "scale": "1/2", "qp": 40, "stream_bytes": 111,
             "psnr": psnr(np.asarray(image), decoded)}
    (tmp_path / "vvc_extreme" / "index.json").write_text(json.dumps({"pictures": {"0.0250": {"one": entry}}}))
    return tmp_path


def test_vvcs_picture_is_the_stored_one_at_full_size(folder):
    found = rivals.Anchors(folder).vvc_picture("0.025", "one", picture())
    assert (found.bytes, found.scale, found.quality, found.picture.size) == (111, 2, 40, (96, 64))


def test_another_picture_of_the_same_name_and_size_is_refused(folder):
    with pytest.raises(UsageError, match="not the recorded"):
        rivals.Anchors(folder).vvc_picture("0.025", "one", picture(seed=1))
    assert rivals.Anchors(folder).vvc_picture("0.025", "one", picture(64, 96)) is None
    assert rivals.Anchors(folder).vvc_picture("0.015", "one", picture()) is None


def test_a_missing_or_broken_folder_is_an_error_and_missing_files_are_not(tmp_path):
    assert rivals.Anchors(tmp_path).recorded("webp", "0.025", "one") is None
    with pytest.raises(UsageError):
        rivals.Anchors(tmp_path / "none")
    (tmp_path / "published_extreme.json").write_text("{")
    with pytest.raises(UsageError, match="published_extreme"):
        rivals.Anchors(tmp_path)


@needs_anchors
def test_the_shared_anchors_are_read():
    anchors = rivals.Anchors(SHARED / "anchors")
    assert sorted(anchors.vvc) == ["0.0118", "0.025"]
    assert anchors.recorded("vvc420", "0.0118", "kodim01")[:3] == (2, 53, 512)
    assert anchors.recorded("jpegxl", "0.025", "kodim24")[2] <= 1228


@needs_anchors
@needs_kodak
@pytest.mark.parametrize("codec", rivals.codecs().values(), ids=lambda c: c.name)
def test_the_search_finds_what_was_recorded(codec):
    if codec.settings.split(",")[0] not in rivals.Anchors(SHARED / "anchors").measured[codec.name]["tool"]:
        pytest.skip("another Pillow than the recorded one")
    recorded = rivals.Anchors(SHARED / "anchors").recorded(codec.name, "0.0118", "kodim04")
    image = Image.open(SHARED / "data" / "kodak" / "kodim04.png").convert("RGB")
    found = rivals.fit(image, codec, 579)
    assert (found.scale, found.quality, found.bytes) == recorded[:3]
    assert psnr(np.asarray(image), np.asarray(found.picture)) == pytest.approx(recorded[3], abs=0.001)
