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
from linic.errors import WeightsError

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import harness  # noqa: E402

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


@settings(max_examples=300, **SAME)
@given(st.sampled_from(range(4)), EDITS)
def test_a_golden_file_with_edits_is_refused_with_a_linic_error_or_says_the_same(number, edits):
    start = time.process_time()
    assert harness.check_picture(edited(harness.golden()[number], edits)) != "decoded to OTHER latents"
    assert time.process_time() - start < 2


@settings(max_examples=300, **SAME)
@given(st.integers(0, 2**32))
def test_edits_behind_good_checksums_become_a_linic_error_or_latents(seed):
    rng = random.Random(seed)
    start, data = time.process_time(), harness.golden()[rng.randrange(4)]
    change = harness.rechecked if data.startswith(harness.SIGNATURE) else harness.refielded
    assert harness.check_picture(change(rng, data))
    assert harness.check_picture(harness.refielded(rng, data))
    assert time.process_time() - start < 2


@settings(max_examples=60, **SAME)
@given(st.integers(0, 2**32))
def test_whatever_symbols_are_coded_are_decoded(seed):
    assert harness.check_picture(*harness.consistent(random.Random(seed))) == "decoded: was right"


def test_a_z_beyond_its_range_is_refused_before_the_networks_see_it():
    refused = [harness.check_picture(harness.consistent_with_wide_z(random.Random(seed))) for seed in range(5)]
    assert set(refused) == {"Damaged"}


@settings(max_examples=80, **SAME)
@given(st.integers(0, 2**32))
def test_a_hostile_weight_file_is_refused_or_its_program_keeps_its_bounds_on_both_backends(seed):
    rng = random.Random(seed)
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"linic-fuzz-{seed}.safetensors"
    try:
        path.write_bytes(harness.weight_file(rng))
        start = time.process_time()
        assert harness.check_weights(path, seed, [Torch], whole=True) in ("accepted", "WeightsError", "Damaged")
        assert time.process_time() - start < 4
    finally:
        path.unlink()


@settings(max_examples=80, **SAME)
@given(st.integers(0, 200), st.integers(0, 4), st.integers(0, 3), st.sampled_from(harness.HOSTILE))
def test_a_line_of_a_program_with_any_value_anywhere_is_refused_or_runs(line, part, at, value):
    from linic.entropy.program import Numpy, Program, plan
    from linic.entropy.walk import walk
    known = harness.model()[0]
    lines = copy.deepcopy(known.lines())
    target = lines[line % len(lines)]
    if isinstance(target[part], list) and target[part]:
        target[part][at % len(target[part])] = value
    else:
        target[part] = value
    try:
        program = Program(lines, known.tensors, known.scales)
    except WeightsError as error:
        assert len(str(error)) < 400
        return
    y_hat = walk(plan(program, harness.Bounded(program), 50, (1, 1)), harness.Made(1, known.scales))
    assert (y_hat == walk(plan(program, Numpy(program), 50, (1, 1)), harness.Made(1, known.scales))).all()


def test_a_golden_file_and_its_model_come_through_the_harness_unharmed(tmp_path):
    assert {harness.check_picture(data) for data in harness.golden()} == {"decoded to the golden latents"}
    path = tmp_path / "same.safetensors"
    path.write_bytes(harness.packed(*harness.parts()))
    assert weights.load_program(path)[2] == harness.model()[2]
    assert harness.check_weights(path, 1, [Torch], whole=True) == "accepted"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_that_once_crashed_no_longer_does(path):
    assert harness.check_picture(path.read_bytes())


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.name)
def test_a_weight_file_that_once_crashed_no_longer_does(path):
    assert harness.check_weights(path, 1, [Torch], whole=True)


def test_the_long_run_counts_what_it_does():
    done = subprocess.run([sys.executable, str(HERE / "run.py"), "--executions", "60", "--seed", "9"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("60 executions in ") and "Damaged" in done.stdout and "CRASH" not in done.stdout
