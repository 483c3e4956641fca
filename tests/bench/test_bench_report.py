import pytest
from PIL import Image

from linic.bench import anchors, report
from linic.errors import UsageError

RESULT = {
    "name": "lalic-xs", "description": "linic, whole files, 24 pictures",
    "results": {"quality": [0, 50], "bpp": [0.1, 0.4], "psnr-rgb": [27.0, 33.0], "ms-ssim-rgb": [0.9, None],
                "encoding_time": [0.5, 0.6], "decoding_time": [0.7, 0.8]},
    "machine": {"cpu": "a processor", "gpu": None}, "command": "linic eval kodak",
}


def test_the_report_has_a_row_a_quality_the_anchors_by_name_and_how_it_was_made():
    text = report.markdown(RESULT, anchors.load("kodak"))
    assert "| 0 | 0.1000 | 27.00 | 0.9000 | 0.50 | 0.70 |" in text
    assert "| 50 | 0.4000 | 33.00 | - |" in text
    assert all(f"| {name} |" in text for name in anchors.load("kodak"))
    assert "cpu a processor" in text and "gpu" not in text and "`linic eval kodak`" in text


def test_a_result_over_other_pictures_than_the_anchors_is_called_not_comparable():
    some = RESULT | {"per_image": [{"name": "kodim01.png"}, {"name": "kodim01.png"}]}
    assert "24 pictures, this result over 1" in report.markdown(some, anchors.load("kodak"), 24)
    assert "Not comparable" not in report.markdown(some, anchors.load("kodak"), 1)


def test_an_anchor_that_shares_no_psnr_is_named_with_the_reason():
    far = {"name": "far", "results": {"bpp": [1, 2], "psnr-rgb": [60.0, 61.0]}}
    assert "no PSNR in common" in report.markdown(far, anchors.load("kodak"))


def test_results_of_other_programs_are_read_too():
    assert report.curve({"name": "LALIC", "results": {"bpp": [0.1], "psnr": [29.0]}}).psnr == (29.0,)


def test_a_quality_without_finite_psnr_is_no_point_of_the_curve():
    assert report.curve({"name": "x", "results": {"bpp": [0.1, 9.0], "psnr-rgb": [29.0, None]}}).bpp == (0.1,)


@pytest.mark.parametrize("curves", [[report.curve(RESULT)], []])
def test_the_plot_is_a_png(tmp_path, curves):
    pytest.importorskip("matplotlib")
    report.plot(curves, anchors.load("kodak"), tmp_path / "rd.png", title="Kodak")
    assert Image.open(tmp_path / "rd.png").format == "PNG"


def test_side_by_side_shows_every_picture_at_its_own_size():
    colours = ["red", "lime", "blue"]
    sheet = report.side_by_side([(c, Image.new("RGB", (100, 50), c)) for c in colours], columns=2)
    counts = {colour: n for n, colour in sheet.getcolors(1 << 16)}
    assert [counts[c] for c in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]] == [5000] * 3


def test_side_by_side_cuts_the_same_window_out_of_each():
    small = report.side_by_side([("a", Image.new("RGB", (100, 50)))] * 2, crop=(10, 10, 30, 20))
    assert small.width < 80
    assert report.stack([small, small]).height == 2 * small.height


def test_nothing_side_by_side_is_refused():
    with pytest.raises(UsageError):
        report.side_by_side([])
