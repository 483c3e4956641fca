"""Files of MRT written once still say what they said: see test_golden.py above."""
import hashlib
import json
from pathlib import Path

import pytest

import linic
from linic import codec, container, weights
from linic.entropy.fast import Torch
from small_models import CARRIERS_HERE

HERE = Path(__file__).parent
LATENTS = json.loads((HERE / "latents.json").read_text())


def read(name):
    return (HERE / f"{name}.linic").read_bytes(), HERE / f"{name.partition('-')[0]}.safetensors"


def test_the_golden_files_are_those_that_are_listed_and_name_their_models():
    assert sorted(p.stem for p in HERE.glob("*.linic")) == sorted(LATENTS) and len(LATENTS) == 8
    for name in LATENTS:
        data, model = read(name)
        file = container.parse(data)
        assert file.digest in (b"", weights.load_program(model)[2]) and file.note == container.NOTE
        assert weights.load(model).digest == weights.load_program(model)[2] and model.stat().st_size < 400_000


@pytest.mark.parametrize("name", LATENTS)
def test_a_golden_file_has_its_latents_on_numpy(name):
    assert codec.verify(*read(name))["latents"] == LATENTS[name]


@pytest.mark.parametrize("carrier", CARRIERS_HERE)
@pytest.mark.parametrize("name", LATENTS)
def test_a_golden_file_has_its_latents_on_torch_by_every_carrier(name, carrier, monkeypatch):
    monkeypatch.setenv("LINIC_CARRIER", carrier)
    data, model = read(name)
    file, (program, tables, _) = container.parse(data), weights.load_program(model)
    backend, seen = Torch(program), hashlib.sha256()
    assert {used for used, _ in backend.carriers.values()} == {carrier}
    for index, (rows, columns) in enumerate(file.cells(32)):
        steps = codec._plan_of(program, backend, file.tiles[0].quality, codec._size(rows, columns))
        seen.update(codec._bytes(codec._decode_tile(file, index, tables, steps)))
    assert seen.hexdigest() == LATENTS[name]


@pytest.mark.parametrize("name", LATENTS)
def test_a_golden_file_becomes_a_picture_of_its_size(name):
    data, model = read(name)
    told = linic.info(data)
    assert linic.decode(data, model=model, device="cpu").size == (told["width"], told["height"])
