"""Damaged files, hostile weight files: some seconds of each, the same ones on every run. At length: run.py."""
import copy
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linic import weights
from linic.entropy.fast import Torch
from linic.entropy.steps import Numpy
from linic.errors import WeightsError

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import harness  # noqa: E402

GOLDEN = pytest.mark.parametrize("golden", harness.GOLDEN, ids=str)
SAME = dict(derandomize=True, deadline=None, database=None)
FILES = sorted(harness.CORPUS.glob("*.linic"))
MODELS = sorted(harness.CORPUS.glob("*.safetensors"))
EDITS = st.lists(st.tuples(st.sampled_from(["set", "flip", "delete", "insert", "double"]), st.integers(0, 1200),
                           st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


def edited(data, edits):
    bad = bytearray(data)
    for kind, at, value in edits:
        at %= len(bad) + 1
        if kind == "set":
            bad[at:at + len(value)] = value
        elif kind == "flip" and at < len(bad):
            bad[at] ^= value[0]
        elif kind == "delete":
            del bad[at:at + value[0]]
        elif kind == "insert":
            bad[at:at] = value
        else:
            bad[at:at] = bad[at:at + value[0]]
    return bytes(bad)


@GOLDEN
@settings(max_examples=120, **SAME)
@given(st.sampled_from(range(4)), EDITS)
def test_a_golden_file_with_edits_is_refused_with_a_linic_error_or_says_the_same(golden, number, edits):
    start = time.process_time()
    assert harness.check_picture(edited(golden.files[number], edits), golden) != "decoded to OTHER latents"
    assert time.process_time() - start < 2


@GOLDEN
@settings(max_examples=75, **SAME)
@given(st.integers(0, 2**32))
def test_edits_behind_good_checksums_become_a_linic_error_or_latents(golden, seed):
    rng = random.Random(seed)
    start, data = time.process_time(), rng.choice(golden.files)
    change = harness.rechecked if data.startswith(harness.SIGNATURE) else harness.refielded
    assert harness.check_picture(change(rng, data), golden)
    assert harness.check_picture(harness.refielded(rng, data), golden)
    assert time.process_time() - start < 2


@GOLDEN
@settings(max_examples=30, **SAME)
@given(st.integers(0, 2**32))
def test_whatever_symbols_are_coded_are_decoded(golden, seed):
    data, latents = harness.consistent(random.Random(seed), golden)
    assert harness.check_picture(data, golden, latents) == "decoded: was right"


def test_a_z_beyond_its_range_is_refused_before_the_networks_see_it():
    files = [harness.consistent_with_wide_z(random.Random(seed)) for seed in range(5)]
    assert {harness.check_picture(data, harness.LALIC) for data in files} == {"Damaged"}


@GOLDEN
@settings(max_examples=25, **SAME)
@given(st.integers(0, 2**32))
def test_a_hostile_weight_file_is_refused_or_its_program_keeps_its_bounds_on_both_backends(golden, seed):
    rng = random.Random(seed)
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"linic-fuzz-{seed}.safetensors"
    try:
        path.write_bytes(harness.weight_file(rng, golden))
        start = time.process_time()
        assert harness.check_weights(path, seed, [Torch], whole=True) in ("accepted", "WeightsError", "Damaged")
        assert time.process_time() - start < 4
    finally:
        path.unlink()


@GOLDEN
@settings(max_examples=40, **SAME)
@given(st.integers(0, 200), st.integers(0, 4), st.integers(0, 3), st.sampled_from(harness.HOSTILE))
def test_a_line_of_a_program_with_any_value_anywhere_is_refused_or_runs(golden, line, part, at, value):
    known = golden.program
    lines = copy.deepcopy(known.lines())
    target = lines[line % len(lines)]
    if isinstance(target[part], list) and target[part]:
        target[part][at % len(target[part])] = value
    else:
        target[part] = value
    try:
        program = type(known)(lines, known.tensors, known.scales)
    except WeightsError as error:
        assert len(str(error)) < 400
        return
    y_hat = harness.walked(program, harness.Bounded(program), 50, harness.Made(1, known.scales))
    assert (y_hat == harness.walked(program, Numpy(program), 50, harness.Made(1, known.scales))).all()


@GOLDEN
def test_a_golden_file_and_its_model_come_through_the_harness_unharmed(golden, tmp_path):
    assert [harness.check_picture(data, golden) for data in golden.files] == ["decoded to the golden latents"] * 4
    path = tmp_path / "same.safetensors"
    path.write_bytes(harness.packed(*golden.parts))
    assert weights.load_program(path)[2] == golden.digest
    assert harness.check_weights(path, 1, [Torch], whole=True) == "accepted"


@GOLDEN
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_that_once_crashed_no_longer_does_by_any_model(path, golden):
    assert harness.check_picture(path.read_bytes(), golden)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_a_weight_file_that_once_crashed_no_longer_does(path):
    assert harness.check_weights(path, 1, [Torch], whole=True)


def test_the_long_run_counts_what_it_does():
    done = subprocess.run([sys.executable, str(HERE / "run.py"), "--executions", "60", "--seed", "9"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("60 executions in ") and "Damaged" in done.stdout and "CRASH" not in done.stdout
