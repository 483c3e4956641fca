"""Weight files: what is shipped is whole, and what is not right is refused with its reason."""
import gzip
import json

import pytest
import torch
from safetensors.torch import load, load_file, save_file

import mrt_files
from linic import weights
from linic.errors import ModelMissing, WeightsError
from linic.models import build
from small_models import randomised, small


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = build("lalic-xs").eval()
    weights.save(path, model, {"name": "tiny"})
    return path, model


def rewrite(path, out, change_tensors=None, change_card=None):
    tensors, card = load_file(path), weights.read_card(path)
    if change_tensors:
        change_tensors(tensors)
    if change_card:
        change_card(card)
    save_file(tensors, out, {"linic": json.dumps(card)})
    return out


def test_shipped_weights_are_listed_with_a_card_and_are_small():
    shipped = [m for m in weights.available() if m["name"] == "lalic-xs"]
    assert shipped and "error" not in shipped[0]
    assert shipped[0]["bytes"] <= 8_000_000
    loaded = weights.load("lalic-xs")
    assert loaded.digest.hex() == shipped[0]["digest"]
    assert sum(p.numel() for p in loaded.model.parameters()) == shipped[0]["parameters"]
    assert len(loaded.tables) == 128 + loaded.model.config.hyper_latents


def test_what_is_saved_is_loaded_within_the_rounding_of_storage(file):
    path, model = file
    loaded = weights.load(path).model.state_dict()
    for key, value in model.state_dict().items():
        step = value.abs().max() / 127 if key.endswith(weights._INT8) else value.abs().max() / 1024
        assert torch.allclose(loaded[key], value, atol=float(step) / 2 + 1e-7), key


def test_saving_is_deterministic(file, tmp_path):
    path, model = file
    weights.save(tmp_path / "again.safetensors", model, {"name": "tiny"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def drop(t):
    del t["net.h_s.head.proj.bias"]


def reshape(t):
    t["net.h_s.head.proj.bias"] = torch.zeros(7)


def poison(t):
    t["net.g_s.head.proj.bias"][0] = float("nan")


def swap(t):
    t["int.h_s.head.proj.weight"][3] += 1


def move(t):
    freqs = t["tables.freqs"].long()
    freqs[:2] += torch.tensor([1, -1])
    t["tables.freqs"] = freqs.to(torch.uint32)


def starve(t):
    t["tables.freqs"][0] = 0


def halves(t):
    t["tables.freqs"] = t["tables.freqs"].to(torch.bfloat16)


def thin(t):
    t["net.h_s.head.proj.bias"] = torch.ones(t["net.h_s.head.proj.bias"].shape, dtype=torch.int8)
    t["net.h_s.head.proj.bias::scale"] = torch.ones(1)


def huge(card):
    card["config"]["transform"]["widths"] = [1 << 20, 128, 256]


def deep(card):
    card["config"]["transform"]["depths"] = [4096, 4096, 4096]


def wide(card):
    card["config"]["transform"]["widths"] = [4096, 128, 256]


@pytest.mark.parametrize("tensors, card, message", [
    (drop, None, "h_s.head.proj.bias should have shape"),
    (reshape, None, "the file has \\(7,\\)"),
    (poison, None, "not finite"),
    (swap, None, "digest"),
    (move, None, "digest"),
    (starve, None, "smallest frequency"),
    (halves, None, "tables.freqs is torch.bfloat16"),
    (thin, None, "no scale for each row"),
    (lambda t: t.pop("tables.lows"), None, "tables.lows"),
    (lambda t: t.pop("int.table.exp"), None, "'table.exp' is not in the file"),
    (None, lambda c: c["program"][-1].reverse(), "no operator"),
    (None, lambda c: c["program"].append(["slice", "more", ["y"], [], [0, 1]]), "digest"),
    (None, lambda c: c.update(program=None), "digest"),
    (None, lambda c: c["config"].update(scales=127), "tables; the program needs|index out of range"),
    (None, lambda c: c["config"].update(scales="128"), "scales"),
    (None, lambda c: c["config"].update(transform=5), "transform"),
    (None, lambda c: c.update(name="../../elsewhere"), "its name is none"),
    (None, huge, "whole numbers up to 4096"),
    (None, wide, "should have shape"),
    (None, deep, "claims 24.* blocks"),
    (None, lambda c: c["config"]["context"].update(depth=4096), "blocks"),
    (None, lambda c: c.update(format=99), "weight format 99"),
    (None, lambda c: c["config"].update(latents="many"), "latents"),
    (None, lambda c: c.pop("config"), "no linic card"),
])
def test_a_weight_file_that_is_not_right_is_refused_with_its_reason(file, tmp_path, tensors, card, message):
    bad = rewrite(file[0], tmp_path / "bad.safetensors", tensors, card)
    with pytest.raises(WeightsError, match=message):
        weights.load(bad)


def test_a_gzipped_file_is_the_same_model_with_two_digits_fewer(file, tmp_path, monkeypatch):
    path, model = file
    packed = tmp_path / "tiny.safetensors.gz"
    weights.save(packed, model, {"name": "tiny"})
    ours, theirs = load(gzip.decompress(packed.read_bytes())), load(path.read_bytes())
    changed = {k for k in theirs if not torch.equal(ours[k], theirs[k])}
    assert changed and all(theirs[k].dtype == torch.float16 and theirs[k].ndim > 1 for k in changed)
    for k in theirs:
        assert torch.allclose(ours[k].double(), theirs[k].double(), rtol=2**-9 + 2**-11, atol=1e-7)
    a, b = weights.read_card(packed), weights.read_card(path)
    assert a | {"checksum": 0} == b | {"checksum": 0}
    assert weights.load(packed).digest == weights.load_program(packed)[2] == weights.load(path).digest
    monkeypatch.setenv("LINIC_MODELS", str(tmp_path))
    assert weights.find("tiny") == packed and weights.available()[0]["bytes"] == packed.stat().st_size


@pytest.mark.parametrize("change", [lambda d: d[:-9], lambda d: d[:1000] + bytes([d[1000] ^ 1]) + d[1001:],
                                    lambda d: d[:10] + b"nonsense"])
def test_a_gzipped_file_that_is_damaged_is_refused(file, tmp_path, change):
    bad = tmp_path / "bad.safetensors.gz"
    bad.write_bytes(change(gzip.compress(file[0].read_bytes())))
    with pytest.raises(WeightsError, match=r"bad\.safetensors\.gz"):
        weights.load(bad)


def test_a_file_that_unpacks_to_more_than_any_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.installed, "LARGEST", 1 << 16)
    path = tmp_path / "bomb.safetensors.gz"
    path.write_bytes(gzip.compress(bytes(1 << 20)))
    with pytest.raises(WeightsError, match="more than"):
        weights.installed.whole(path)


def test_what_the_normative_networks_were_as_floats_steers_nothing(file, tmp_path):
    """They are kept for training on; the program decides."""
    def other(t):
        t["net.h_s.head.proj.bias"] += 1

    path = rewrite(file[0], tmp_path / "other.safetensors", other)
    assert weights.load_program(path)[2] == weights.load(file[0]).digest
    with pytest.raises(WeightsError, match="checksum"):     # the file was altered all the same
        weights.load(path)
    path = rewrite(path, path, None, lambda card: card.update(checksum=weights._checksum(load_file(path))))
    assert weights.load(path).digest == weights.load(file[0]).digest


def test_without_a_program_the_floats_are_what_the_digest_covers(tmp_path):
    path = tmp_path / "floats.safetensors"
    weights.save(path, randomised(small("ablation-xs-column")), {"name": "floats"})
    assert weights.load(path).program is None
    with pytest.raises(WeightsError, match="no integer program"):
        weights.load_program(path)

    def other(t):
        t["net.h_s.head.proj.bias"] += 1

    with pytest.raises(WeightsError, match="digest"):
        weights.load(rewrite(path, tmp_path / "bad.safetensors", other))


@pytest.mark.parametrize("change", [halves, swap, move, starve, lambda t: t.pop("tables.lows")])
def test_the_program_alone_is_refused_as_the_whole_file_is(file, tmp_path, change):
    with pytest.raises(WeightsError):
        weights.load_program(rewrite(file[0], tmp_path / "bad.safetensors", change))


def test_latents_that_the_configuration_does_not_have_are_refused(file, tmp_path):
    bad = rewrite(file[0], tmp_path / "bad.safetensors", None, lambda c: c["config"].update(latents=255))
    with pytest.raises(WeightsError, match="codes 256 latents"):
        weights.load_program(bad)


def test_a_header_that_nests_without_end_is_refused(tmp_path):
    header = b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "deep.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match="card"):
        weights.read_card(tmp_path / "deep.safetensors")


def test_a_card_without_a_program_hides_no_other_model(file, tmp_path, monkeypatch):
    rewrite(file[0], tmp_path / "old.safetensors", None, lambda c: c.pop("program"))
    monkeypatch.setenv("LINIC_MODELS", str(tmp_path))
    assert {"tiny", "lalic-xs"} <= {m["name"] for m in weights.available() if "error" not in m}


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0" + b"{}" + b" " * 14])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"safetensors|card"):
        weights.read_card(tmp_path / "x.safetensors")


def test_a_broken_file_in_a_folder_is_listed_as_broken_and_hides_no_other(tmp_path, monkeypatch):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    monkeypatch.setenv("LINIC_MODELS", str(tmp_path))
    names = {m["name"]: m.get("error") for m in weights.available()}
    assert names["broken"] and names["lalic-xs"] is None
    with pytest.raises(ModelMissing, match="LINIC_MODELS"):
        weights.find("broken")


# MRT.


@pytest.fixture(scope="module")
def extreme(tmp_path_factory):
    path, model = tmp_path_factory.mktemp("mrt") / "tiny-mrt.safetensors", mrt_files.made(mrt_files.TINY)
    mrt_files.save(path, model, "tiny-mrt")
    return path, model


def test_an_mrt_model_is_loaded_as_it_was_saved_with_both_decoders(extreme):
    (path, model), loaded = extreme, weights.load(extreme[0])
    second = mrt_files.critic(model)
    assert second.keys() == loaded.adversarial.keys() and loaded.card["decoders"] == ["faithful", "adversarial"]
    for kept, wanted in ((loaded.model.state_dict(), model.state_dict()), (loaded.adversarial, second)):
        for key, value in wanted.items():
            if key in weights.TRAINING_ONLY:
                continue
            coarse = key.endswith(weights._INT8) or key.startswith("rcm.")
            step = value.abs().max() / (127 if coarse else 1024) if value.numel() else 0
            assert torch.allclose(kept[key], value, atol=float(step) / 2 + 1e-7), key
    assert len(loaded.tables) == 20 and loaded.program.latents == 6
    assert weights.load_program(path)[2] == loaded.digest == bytes.fromhex(loaded.card["digest"])
    assert weights.known_answer(loaded.program, loaded.tables) == loaded.card["known_answer"]


def test_what_is_of_training_alone_is_not_stored(extreme):
    assert not [key for key in load_file(extreme[0]) if "rate_control" in key]
    assert not weights.load(extreme[0]).model.rate_control.any()


def test_saving_mrt_is_deterministic_and_a_second_decoder_changes_no_digest(extreme, tmp_path):
    path, model = extreme
    mrt_files.save(tmp_path / "again.safetensors", model, "tiny-mrt")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    card = weights.save(tmp_path / "one.safetensors", model, {})
    assert card["digest"] == weights.read_card(path)["digest"] and "decoders" not in card
    assert weights.load(tmp_path / "one.safetensors").adversarial is None


def lose(t):
    del t["adversarial.gain_dec"]


def bend(t):
    t["adversarial.gain_dec"] = torch.zeros(3, 7)


def blow(t):
    t["adversarial.gain_dec"][0] = float("inf")


def nudge(t):
    t["int.rcm.mean.weight"][0, 0] += 1


@pytest.mark.parametrize("tensors, card, message", [
    (lose, None, "gain_dec should have shape .*nothing"),
    (bend, None, "the file has \\(3, 7\\)"),
    (blow, None, "not finite"),
    (nudge, None, "digest"),
    (move, None, "digest"),
    (lambda t: t.pop("int.table.exp"), None, "'table.exp' is not in the file"),
    (None, lambda c: c.update(program=None), "no program"),
    (None, lambda c: c["config"].update(tokens="slots", init="torch", order="windows"), "not cells"),
    (None, lambda c: c["config"].update(latents=7), "should have shape|codes 6 latents"),
    (None, lambda c: c["config"].update(decoder_pairs=4096), "claims .* blocks"),
    (None, lambda c: c["config"].update(pixel_depths=[4096, 4096, 4096]), "claims .* blocks"),
    (None, lambda c: c["config"].update(rcm_depth=4096), "claims .* blocks"),
    (None, lambda c: c["config"].update(width=4096), "should have shape"),
    (None, lambda c: c["config"].update(width=1 << 30), "from 1 to 4096"),
    (None, lambda c: c["config"].update(scales=21), "scales|tables"),
    (None, lambda c: c["config"].update(family="lalic"), "unknown field|program"),
    (None, lambda c: c["program"].pop(), "codes no 'y'"),
    (None, lambda c: c["program"][0].__setitem__(4, [0, 0, 5]), "a row is"),
])
def test_an_mrt_file_that_is_not_right_is_refused_with_its_reason(extreme, tmp_path, tensors, card, message):
    bad = rewrite(extreme[0], tmp_path / "bad.safetensors", tensors, card)
    with pytest.raises(WeightsError, match=message):
        weights.load(bad)


@pytest.mark.parametrize("preset", ["ablation-mrt-slots", "ablation-mrt-rcm-1d"])
def test_an_ablation_without_a_program_is_not_saved(preset, tmp_path):
    with pytest.raises(WeightsError, match=preset):
        weights.save(tmp_path / "x.safetensors", build(preset).eval(), {})
