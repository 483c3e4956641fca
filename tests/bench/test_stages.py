import argparse
import sys

import pytest

from linic.app.cli import bench
from linic.bench import stages


def result(size: tuple[int, int], decode: float) -> dict:
    return {"model": "m", "weights": "trained", "size": list(size), "device": "cpu", "threads": 1,
            "arithmetic": "integers", "memory": {"loaded": 400.0, "encode": 500.0, "decode": None},
            "encode": {"analysis": 1.0, "in all": 2.0}, "decode": {"synthesis": 3.0, "in all": decode}}


def test_growth_is_the_power_of_the_pixels():
    text = stages.size_table([result((100, 100), 10.0), result((200, 200), 40.0), result((400, 400), 640.0)])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| 100x", "| 200x", "| 400x"))]
    assert [row[-1].strip(" |") for row in rows] == ["", "1.00", "2.00"]
    assert [row[-2] for row in rows] == ["1000", "1000", "4000"]        # ms a megapixel
    assert "400 loaded" in text and rows[0][-4:-2] == ["500", "-"]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone")
def test_a_peak_is_that_since_the_last_one():
    if stages._peak() is None:
        pytest.skip("the system does not let the peak be reset")
    block = bytearray(64 << 20)
    with_it = stages._peak()
    del block
    stages._peak()
    assert with_it - stages._peak() > 50


def test_sizes_are_read_from_the_command_line():
    assert bench._sizes("64x48,9x7") == [(64, 48), (9, 7)]
    assert bench._sizes("all") == list(stages.SIZES)
    for wrong in ("64", "0x3", "64x", "axb"):
        with pytest.raises(argparse.ArgumentTypeError):
            bench._sizes(wrong)
