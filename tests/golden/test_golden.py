"""Files written once still say what they said: the promise of a format version, on a small model kept beside them.

Where one of these fails, old files no longer decode: a new version of the format is due, not new golden files.
"""
import hashlib
import json
from pathlib import Path

import pytest

import linic
from linic import codec, container, weights
from linic.entropy.fast import Torch
from linic.entropy.program import plan
from small_models import CARRIERS_HERE

HERE = Path(__file__).parent
MODEL = HERE / "tiny.safetensors"
LATENTS = json.loads((HERE / "latents.json").read_text())
SIZES = {"1x1-q0": (1, 1), "70x50-q50": (70, 50), "70x50-q50-compact": (70, 50), "130x190-q100": (130, 190)}


def read(name):
    return (HERE / f"{name}.linic").read_bytes()


def test_the_golden_files_are_those_that_are_listed():
    assert sorted(p.stem for p in HERE.glob("*.linic")) == sorted(LATENTS) == sorted(SIZES)
    assert MODEL.stat().st_size < 300_000


def test_the_model_has_the_digest_that_the_files_name():
    digest = weights.load_program(MODEL)[2]
    assert weights.load(MODEL).digest == digest
    assert {container.parse(read(name)).digest for name in SIZES if "compact" not in name} == {digest}


@pytest.mark.parametrize("name", SIZES)
def test_a_golden_file_has_its_latents_on_numpy(name):
    assert codec.verify(read(name), MODEL)["latents"] == LATENTS[name]


@pytest.mark.parametrize("carrier", CARRIERS_HERE)
@pytest.mark.parametrize("name", SIZES)
def test_a_golden_file_has_its_latents_on_torch_by_every_carrier(name, carrier, monkeypatch):
    monkeypatch.setenv("LINIC_CARRIER", carrier)
    file = container.parse(read(name))
    program, tables, _ = weights.load_program(MODEL)
    backend = Torch(program)
    assert {used for used, _ in backend.carriers.values()} == {carrier}
    (rows, columns), = file.cells()
    steps = plan(program, backend, file.tiles[0].quality, codec._size(rows, columns))
    latents = codec._bytes(codec._decode_tile(file, 0, tables, steps))
    assert hashlib.sha256(latents).hexdigest() == LATENTS[name]


@pytest.mark.parametrize("name", SIZES)
def test_a_golden_file_becomes_a_picture_of_its_size(name):
    picture = linic.decode(read(name), model=MODEL, device="cpu")
    assert (picture.size, picture.mode) == (SIZES[name], "RGB")


def test_the_compact_file_says_the_same_in_40_bytes_less():
    full, compact = (container.parse(read(name)) for name in ("70x50-q50", "70x50-q50-compact"))
    assert full.tiles[0].payload == compact.tiles[0].payload
    assert len(read("70x50-q50-compact")) == len(compact.tiles[0].payload) + 8 == len(read("70x50-q50")) - 40
