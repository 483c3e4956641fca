import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import linic
from linic.app.cli import main
from linic.bench import extreme, extreme_report, rivals
from linic.bench.extreme import Coded
from linic.bench.judge import Judge
from linic.bench.rivals import Anchors
from linic.errors import UsageError

SHARED = Path(__file__).parents[3] / "shared"
RATES = (0.5, 0.8)      # of tiny pictures: headers alone are .1 bpp and more


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    grains = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(grains).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def paths(tmp_path):
    found = []
    for i, size in enumerate([(96, 64), (64, 96)]):
        found.append(tmp_path / f"p{i}.png")
        picture(i, size).save(found[-1])
    return found


class Jpeg:
    """In the codec's place. As `weights` differ, so do its identity and its files."""

    estimated, name = False, "jpeg"

    def __init__(self, weights: str = "a"):
        self.identity, self.encoded = weights, 0

    def encode(self, image, quality):
        self.encoded += 1
        file = io.BytesIO()
        image.save(file, "JPEG", quality=max(1, quality), optimize=True)
        return Coded(len(file.getvalue()), file.getvalue(), 0.5)

    def decode(self, coded):
        return Image.open(io.BytesIO(coded.content)).convert("RGB")

    def kept(self, coded, name):
        return coded

    def read(self, name):
        return None


def run(paths, out, ours=None, **kwargs):
    return extreme.run(paths, Judge(), ours=ours, out=out, qualities=(5, 60), rates=RATES, **kwargs)


def test_one_run_has_every_codec_by_the_same_measures(paths, tmp_path):
    result = run(paths, tmp_path / "o", Jpeg())
    assert {r["codec"] for r in result["rows"]} == {"linic", "matched", *rivals.codecs()}
    for row in result["rows"]:
        assert row["bpp"] == pytest.approx(8 * row["bytes"] / (96 * 64), abs=1e-6)
        assert row["psnr-rgb"] and row["lpips-alex"] is None
        if row["codec"] in rivals.codecs():
            assert row["bpp"] <= float(row["rate"])
    assert json.dumps(result, allow_nan=False)


def test_at_equal_bytes_ours_is_the_best_that_is_not_larger(paths, tmp_path):
    codec = Jpeg()
    result = run(paths, tmp_path / "o", codec)
    matched = [r for r in result["rows"] if r["codec"] == "matched"]
    of = {(r["codec"], r["rate"], r["picture"]): r for r in result["rows"]}
    for row in matched:
        image = Image.open(next(p for p in paths if p.name == row["picture"]))
        assert row["bytes"] <= row["bytes_against"] == of[row["against"], row["rate"], row["picture"]]["bytes"]
        assert row["quality"] == 100 or codec.encode(image, row["quality"] + 1).bytes > row["bytes_against"]


def test_a_second_run_makes_nothing_and_new_weights_make_ours_alone(paths, tmp_path):
    first = run(paths, tmp_path / "o", Jpeg())
    codec = Jpeg()
    again = run(paths, tmp_path / "o", codec)
    assert first["made"] and not again["made"] and not codec.encoded and again["rows"] == first["rows"]
    other = run(paths, tmp_path / "o", Jpeg("b"))
    # Two qualities and two rates of two pictures, a rate without a file of ours counted too.
    assert other["made"] == 8


def test_rows_of_a_result_are_known_elsewhere_and_a_torn_line_is_made_again(paths, tmp_path):
    result = run(paths, tmp_path / "o")
    recorded = {"codec": "jpegxl", "picture": "p0.png", "rate": "0.5", "bytes": 300, "bpp": 0.4, "recorded": True}
    result["rows"].append(recorded)         # of another run: without a key
    (tmp_path / "old.json").write_text(extreme_report.json_text(result, extreme_report.summary(result)))
    assert not run(paths, tmp_path / "new", known=[tmp_path / "old.json"])["made"]
    rows = tmp_path / "o" / "rows.jsonl"
    rows.write_text(rows.read_text()[:-40])
    assert run(paths, tmp_path / "o")["made"] == 1


def test_a_changed_picture_is_another_one(paths, tmp_path):
    run(paths, tmp_path / "o")
    picture(9).save(paths[0])
    assert run(paths, tmp_path / "o")["made"] == len(rivals.codecs()) * len(RATES)


POINTS = [{"bpp": 0.01, "lpips-alex": 0.7, "psnr-rgb": 22.0}, {"bpp": 0.02, "lpips-alex": 0.5, "psnr-rgb": 23.0},
          {"bpp": 0.04, "lpips-alex": 0.4, "psnr-rgb": 25.0}]


def test_reading_a_curve_is_exact_at_its_points_and_linear_between_two():
    for point in POINTS:
        assert extreme_report.at_rate(POINTS, "lpips-alex", point["bpp"]) == pytest.approx(point["lpips-alex"])
    assert extreme_report.at_rate(POINTS[:2], "lpips-alex", math.sqrt(0.0002)) == pytest.approx(0.6)
    assert extreme_report.at_rate(POINTS[:1], "psnr-rgb", 0.01) == 22.0


def test_a_curve_is_not_read_beyond_its_ends_nor_through_means_of_other_pictures():
    assert extreme_report.at_rate(POINTS, "lpips-alex", 0.0097) is None
    assert extreme_report.at_rate(POINTS, "lpips-alex", 0.042) is None
    assert extreme_report.at_rate(POINTS, "lpips-alex", 0.0099) == pytest.approx(0.7, abs=0.02)
    some = [dict(POINTS[0], complete=False), *POINTS[1:]]
    assert extreme_report.at_rate(some, "lpips-alex", 0.012) is None
    assert extreme_report.at_rate(POINTS, "vgg19n", 0.02) is None


@pytest.mark.parametrize("key", ["lpips-alex", "psnr-rgb"])
def test_twice_the_size_at_equal_quality_is_100_percent(key):
    double = [dict(p, bpp=2 * p["bpp"]) for p in POINTS]
    found = extreme_report.compare(double, POINTS, key)
    assert found["percent"] == pytest.approx(100) and found["share"] == pytest.approx(1)
    assert (found["low"], found["high"]) == {"lpips-alex": (0.4, 0.7), "psnr-rgb": (22.0, 25.0)}[key]
    assert (found["from"], found["to"]) == (pytest.approx(0.02), pytest.approx(0.04))


def test_a_constant_gap_is_the_difference_even_where_no_quality_is_common():
    better = [dict(p, **{"lpips-alex": p["lpips-alex"] - 0.35}) for p in POINTS]
    found = extreme_report.compare(better, POINTS)
    assert found["difference"] == pytest.approx(-0.35) and "percent" not in found


def test_curves_without_anything_in_common_or_of_one_point_say_nothing():
    assert extreme_report.compare(POINTS[:1], POINTS) == {}
    far = [dict(p, bpp=100 * p["bpp"], **{"lpips-alex": p["lpips-alex"] - 0.35}) for p in POINTS]
    assert extreme_report.compare(far, POINTS) == {}


def test_the_report_the_plots_and_the_sheets_are_written(paths, tmp_path):
    pytest.importorskip("matplotlib")
    codec, out = Jpeg(), tmp_path / "o"
    result = run(paths, out, codec)
    extreme_report.write(result, {p.name: p for p in paths}, out, codec)
    text = (out / "extreme.md").read_text()
    assert "| linic | q5 |" in text and "| JPEG | 0.5 |" in text and "never trained" not in text
    assert "ESTIMATED" not in text and "no comparison" in text
    assert json.loads((out / "extreme.json").read_text())["rows"] == result["rows"]
    assert Image.open(out / "lpips-alex.png").format == Image.open(out / "psnr.png").format == "PNG"
    # Two groups of three pictures of 96 pixels at most beside one another.
    gap, caption = extreme_report.GAP, extreme_report.CAPTION
    assert Image.open(out / "sheet-0.8.png").size == (6 * (96 + gap) + gap, 96 + caption + 2 * gap)
    assert Image.open(out / "worst-0.8.png").size == (3 * (96 + gap) + gap, 64 + 96 + 2 * (caption + gap) + gap)


def test_an_estimate_says_so(paths, tmp_path):
    codec = Jpeg()
    codec.estimated = True
    result = run(paths, tmp_path / "o", codec)
    text = extreme_report.markdown(result, extreme_report.summary(result))
    assert "ESTIMATED BITS" in text.splitlines()[2]


def test_a_sheet_is_as_large_as_its_pictures_and_scales_large_ones():
    groups = [[("a", picture(0, (768, 512))), ("b", picture(1, (768, 512)))]] * 5
    gap, caption = extreme_report.GAP, extreme_report.CAPTION
    assert extreme_report.sheet(groups, 192).size == (4 * (192 + gap) + gap, 3 * (128 + caption + gap) + gap)
    with pytest.raises(UsageError):
        extreme_report.sheet([])


@pytest.mark.skipif(not (SHARED / "anchors").is_dir(), reason="no anchors here")
def test_published_points_are_lpips_alex_with_charts_marked_and_none_of_mrt():
    found = extreme_report.published(Anchors(SHARED / "anchors"))
    assert {name for name, e in found.items() if e["chart"]} == {"DLF", "GLC", "GLC (DLF's run)", "OneDC"}
    assert {"StableCodec", "MS-ILLM", "MS-ILLM before its GAN", "VTM (DiffEIC's run)"} <= set(found)
    assert not any("MRT" in name for name in found)
    assert found["MS-ILLM before its GAN"]["points"][0]["lpips-alex"] == 0.278794
    assert all("lpips-alex" in p for e in found.values() for p in e["points"])
    assert extreme_report.published(None) == {}


def test_the_command_runs_without_a_model_and_refuses_what_does_not_go_together(paths, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = str(tmp_path / "o")
    assert main(["bench", "extreme", str(tmp_path), "--out", out, "--rates", "0.8", "--limit", "1"]) == 0
    assert "# Below .04 bits per pixel: classical codecs" in capsys.readouterr().out
    assert main(["bench", "extreme", str(tmp_path)]) == 2
    assert main(["bench", "extreme", str(tmp_path), "--out", out, "--ablate"]) == 2
    assert main(["bench", "extreme", str(tmp_path), "--out", out, "--model", "a", "--estimated", "b"]) == 2


def test_whole_files_are_kept_and_judged_from_disk(paths, tmp_path, monkeypatch):
    weights = tmp_path / "m.safetensors"
    weights.write_bytes(b"weights")
    codec = Jpeg()
    monkeypatch.setattr(linic, "encode", lambda image, quality, model, device: codec.encode(image, quality).content,
                        raising=False)
    monkeypatch.setattr(linic, "info", lambda data: {"payload": len(data) - 30}, raising=False)
    monkeypatch.setattr(linic, "decode", lambda data, model, device, realism=0: codec.decode(Coded(0, data, 0)),
                        raising=False)
    ours = extreme.Files(str(weights), "cpu", tmp_path / "files")
    result = run(paths, tmp_path / "o", ours)
    for row in result["rows"]:
        if row["codec"] in ("linic", "matched"):
            name = f"{Path(row['picture']).stem}-q{row['quality']:03d}.linic"
            file = tmp_path / "files" / f"m-{ours.identity[:8]}" / name
            assert file.stat().st_size == row["bytes"] == row["payload"] + 30
    row = next(r for r in result["rows"] if r["codec"] == "matched")
    again, codec.encoded = codec.encoded, 0
    assert extreme.picture_of(row, next(p for p in paths if p.name == row["picture"]), ours, None).size
    assert again and not codec.encoded      # decoded from the file that was kept
    text = extreme_report.markdown(result, extreme_report.summary(result))
    assert "30 bytes are header" in text and "More than 12" in text
    assert extreme.Files(str(weights), realism=0.5).identity != ours.identity
