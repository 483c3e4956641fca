import io
import json
import math

import numpy as np
import pytest
from PIL import Image

import linic
from linic.bench import evaluate as bench
from linic.bench import report
from linic.bench.judge import KEYS, Judge
from linic.bench.metrics import psnr
from linic.errors import UsageError


def encode(image, quality=50, model="", device=""):
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=quality)
    return out.getvalue()


def decode(data, model=None, device=""):
    return Image.open(io.BytesIO(data))


@pytest.fixture
def jpeg_codec(monkeypatch):
    """JPEG in the codec's place: its rates and errors are real."""
    monkeypatch.setattr(linic, "encode", encode, raising=False)
    monkeypatch.setattr(linic, "decode", decode, raising=False)
    monkeypatch.setattr(linic, "info", lambda data: {"payload": len(data) - 100}, raising=False)


@pytest.fixture
def folder(tmp_path):
    for i, (mode, size) in enumerate([("RGB", (200, 180)), ("L", (64, 48)), ("RGB", (48, 64))]):
        Image.effect_noise(size, 40).convert(mode).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


@pytest.mark.usefixtures("jpeg_codec")
def test_numbers_are_those_of_the_files_kept(folder, tmp_path):
    kept = tmp_path / "kept"
    result = bench.evaluate(bench.pictures_in(folder), [20, 80], keep=kept)
    assert len(result["per_image"]) == 6
    for row in result["per_image"]:
        data = (kept / f"{row['name']}-q{row['quality']:03d}.linic").read_bytes()
        image = Image.open(folder / row["name"])
        assert row["bytes"] == len(data)
        assert row["bpp"] == 8 * len(data) / (image.width * image.height)
        assert row["bpp"] - row["bpp_payload"] == pytest.approx(800 / (image.width * image.height))
        a, b = (np.asarray(i.convert("RGB")) for i in (image, decode(data)))
        assert row["psnr-rgb"] == psnr(a, b)


@pytest.mark.usefixtures("jpeg_codec")
def test_the_result_is_compressais_schema_with_one_mean_a_quality(folder):
    result = bench.evaluate(bench.pictures_in(folder), [20, 80], model="m", command="linic eval")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {"name", "description", "results", "per_image", "machine", "command"} <= set(result)
    means = result["results"]
    assert {"psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time", "decoding_time", "quality"} <= set(means)
    assert all(len(values) == 2 for values in means.values())
    assert means["bpp"][0] < means["bpp"][1] and means["psnr-rgb"][0] < means["psnr-rgb"][1]
    rows = [r for r in result["per_image"] if r["quality"] == 80]
    assert means["psnr-rgb"][1] == pytest.approx(sum(r["psnr-rgb"] for r in rows) / 3)


@pytest.mark.usefixtures("jpeg_codec")
def test_ms_ssim_is_the_mean_of_the_pictures_that_have_one(folder):
    result = bench.evaluate(bench.pictures_in(folder), [50])
    values = [r["ms-ssim-rgb"] for r in result["per_image"]]
    assert [v is None for v in values] == [False, True, True]
    assert result["results"]["ms-ssim-rgb"] == [values[0]]


def test_an_endless_psnr_stays_out_of_json():
    rows = [{"quality": 1, "psnr-rgb": math.inf}, {"quality": 2, "psnr-rgb": 30.0}]
    assert bench.means(rows, "psnr-rgb", [1, 2, 3]) == [None, 30.0, None]


@pytest.mark.usefixtures("jpeg_codec")
def test_a_folder_is_taken_as_its_pictures(folder):
    assert len(bench.evaluate(folder, [50])["per_image"]) == 3


@pytest.mark.usefixtures("jpeg_codec")
def test_a_picture_that_comes_back_in_another_size_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(linic, "decode", lambda data, model, device: Image.new("RGB", (1, 1)))
    with pytest.raises(UsageError, match="came back"):
        bench.evaluate(bench.pictures_in(folder), [50])


def test_a_folder_without_pictures_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no pictures"):
        bench.pictures_in(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        bench.pictures_in(tmp_path / "gone")


def test_one_picture_can_be_named_instead_of_a_folder(folder):
    assert bench.pictures_in(folder / "0.png") == [folder / "0.png"]


@pytest.mark.usefixtures("jpeg_codec")
def test_a_judge_brings_its_columns_and_changes_none_of_the_others(folder):
    plain = bench.evaluate(folder, [20, 80])
    judged = bench.evaluate(folder, [20, 80], judge=Judge())
    assert set(KEYS) <= set(judged["results"]) and set(KEYS) <= set(judged["per_image"][0])
    for key in ("bpp", "psnr-rgb", "ms-ssim-rgb"):
        assert judged["results"][key] == plain["results"][key]
    assert judged["results"]["seam16-ratio"][0] > judged["results"]["seam16-ratio"][1]      # JPEG's blocks
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    text = report.markdown(judged)
    assert "| LPIPS(alex) |" in text and "no model of linic is trained on it" in text
    assert "LPIPS" not in report.markdown(plain)


def test_tiles_are_the_middle_of_a_picture_and_small_ones_stay_whole(folder, tmp_path):
    out = tmp_path / "tiles"
    out.mkdir()
    paths = bench.tiles(bench.pictures_in(folder), 64, 48, out)
    assert len(paths) == 3 * 3 + 1 + 1 and paths[-1] == folder / "2.png"
    whole = np.asarray(Image.open(folder / "0.png"))
    joined = np.block([[[np.asarray(Image.open(p))] for p in paths[3 * y : 3 * y + 3]] for y in range(3)])
    assert (joined == whole[18:162, 4:196]).all()
