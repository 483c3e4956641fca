"""LALIC: counts of the paper's model, shapes, causality, presets."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linic.errors import UsageError
from linic.models import PRESETS, authors, build, preset
from linic.models.blocks import merge_shifts
from linic.models.config import from_dict, to_dict


def on_meta(name):
    with torch.device("meta"):
        return build(name)


def test_the_authors_model_has_their_number_of_parameters():
    model = on_meta("lalic-authors")
    assert authors.their_parameter_count(model) == 66_133_045
    assert authors.their_parameter_count(model, merged=True) == 65_415_893


def test_lalic_adds_gains_and_quality_rows_to_the_papers_model():
    ours, theirs = on_meta("lalic"), on_meta("lalic-authors")
    more = {k: v.numel() for k, v in ours.state_dict().items() if k not in theirs.state_dict()}
    assert all(k.endswith(".row.weight") or k in ("gain_enc", "gain_dec", "ln_prior") for k in more)
    assert sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in theirs.parameters()) == \
        sum(n for k, n in more.items() if k != "ln_prior")


@pytest.fixture(scope="module")
def macs():
    """GMAC of each part of the paper's model for 768x512 (its "FLOPs" are MACs)."""
    model = merge_shifts(on_meta("lalic-authors")).eval()
    with FlopCounterMode(display=False, depth=4) as counter:
        model(torch.empty(1, 3, 512, 768, device="meta"))

    def of(part, without=()):
        counts = counter.get_flop_counts().get(f"Lalic.{part}", {})
        return sum(n for op, n in counts.items() if not any(w in str(op) for w in without)) / 2e9

    return of


@pytest.mark.parametrize("part, expected", [("g_a", 90.521), ("g_s", 90.521), ("h_a", 2.897), ("h_s", 2.897)])
def test_the_papers_transforms_take_the_published_number_of_operations(macs, part, expected):
    assert macs(part, without=["biwkv"]) == pytest.approx(expected, abs=0.001)


def test_the_papers_entropy_model_takes_the_published_number_of_operations(macs):
    channel = sum(macs(f"contexts.{k}.channel", without=["biwkv"]) for k in range(1, 5))
    aggregation = sum(macs(f"contexts.{k}.aggregate") for k in range(5))
    taps = sum(macs(f"contexts.{k}.taps") for k in range(5))
    assert channel == pytest.approx(27.981, abs=0.001)
    assert aggregation == pytest.approx(19.262, abs=0.001)
    assert taps == pytest.approx(0.78, abs=0.01)  # 12 of 25 taps, at the non-anchors only


@pytest.mark.parametrize("name, parameters, gmac", [("lalic-xs", 3.9, (9.2, 9.4)), ("lalic-s", 18.3, (40, 48))])
def test_small_presets_have_the_size_that_they_announce(name, parameters, gmac):
    model = merge_shifts(on_meta(name)).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.1)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 512, 768, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    total = sum(n for op, n in counts.items() if "biwkv" not in str(op)) / 2e9
    assert gmac[0] <= total <= gmac[1], total


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_built_and_survives_a_round_trip_through_plain_data(name):
    config = preset(name)
    assert from_dict(to_dict(config)) == config
    model = on_meta(name)
    assert all(torch.isfinite(torch.tensor(p.numel())) for p in model.parameters())


@pytest.mark.parametrize("name", ["lalic-xs", "lalic", "ablation-aft", "ablation-conv", "ablation-depth-2222"])
def test_forward_gives_picture_and_likelihoods_and_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    config = to_dict(preset(name))
    config["transform"]["depths"] = [1] * len(config["transform"]["depths"])
    config["hyper"]["depths"] = [1]
    config["style"]["zero_init"] = False  # zero output layers stop the gradient of a first step
    model = build(from_dict(config))
    for head in [p for n, p in model.named_parameters() if n.endswith(("mean.weight", "scale.weight"))]:
        torch.nn.init.normal_(head, std=0.01)
    x = torch.rand(2, 3, 64, 128)
    out = model(x, torch.tensor([10.0, 90.0]))
    assert out["x_hat"].shape == x.shape
    assert out["likelihoods"]["y"].shape == (2, config["latents"], 4, 8)
    assert out["likelihoods"]["z"].shape == (2, config["hyper_latents"], 1, 2)
    assert all((p > 0).all() and (p <= 1).all() for p in out["likelihoods"].values())
    loss = (out["x_hat"] - x).square().mean() - sum(p.log2().mean() for p in out["likelihoods"].values())
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_merged_shift_computes_what_the_branches_do():
    torch.manual_seed(1)
    model = build("lalic-xs").eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before = model(x, torch.tensor([50.0]))["x_hat"]
        after = merge_shifts(model)(x, torch.tensor([50.0]))["x_hat"]
    assert torch.equal(before, after)


@pytest.mark.parametrize("scan", ["row", "column", "alternating"])
def test_scans_see_the_tokens_in_their_order(scan):
    config = to_dict(preset("lalic-xs"))
    config["style"]["scan"] = scan
    config["transform"]["depths"] = [1, 2, 1]
    torch.manual_seed(0)
    model = build(from_dict(config)).eval()
    blocks = model.g_a.stages[1].blocks
    columns = [b.spatial.column for b in blocks]
    assert columns == {"row": [False, False], "column": [True, True], "alternating": [False, True]}[scan]
    torch.nn.init.normal_(blocks[0].spatial.out.weight)
    x = torch.randn(1, 4, 6, 128)
    with torch.inference_mode():
        straight, turned = blocks[0].spatial, x.transpose(1, 2).contiguous()
        straight.shift = None
        as_is = straight(x)
        straight.column = not straight.column
        assert torch.allclose(straight(turned).transpose(1, 2), as_is, atol=1e-5)


def test_normative_networks_keep_the_ranges_of_the_integers_whatever_the_weights():
    torch.manual_seed(0)
    model = build("lalic-xs")
    for name, p in model.named_parameters():
        if name.startswith(("h_s", "contexts")):
            torch.nn.init.normal_(p, std=3.0)
    seen = []
    for net in (model.h_s, model.contexts):
        for module in net.modules():
            if hasattr(module, "kvr"):
                w, u = module.decay(1, torch.zeros(1))
                assert (w >= 0).all() and (w <= 8).all() and (u.abs() <= 3).all()
                module.register_forward_hook(lambda m, i, o: seen.append(o.abs().max().item()))
            if type(module).__name__ == "Block":
                module.register_forward_hook(lambda m, i, o: seen.append(o.abs().max().item() <= 64))
    model.eval()(torch.rand(1, 3, 64, 64))
    assert len(seen) > 5
    assert all(v is not False for v in seen)
    widths = [m.in_features for m in model.contexts.modules() if hasattr(m, "in_features")]
    assert all(n % 8 == 0 for n in widths)


def test_an_unknown_preset_or_field_is_named():
    with pytest.raises(UsageError, match="no preset 'lalic-xl'"):
        build("lalic-xl")
    with pytest.raises(UsageError, match="'colour'"):
        from_dict({**to_dict(preset("lalic-xs")), "colour": 3})
    with pytest.raises(UsageError, match="sum to"):
        from_dict({**to_dict(preset("lalic-xs")), "latents": 100})


def test_a_checkpoint_in_the_authors_layout_is_taken_over_name_by_name():
    """Their layout is rebuilt here from our names; every tensor gets a value of its own."""
    torch.manual_seed(0)
    config = to_dict(preset("lalic-authors"))
    config["transform"]["depths"], config["hyper"]["depths"] = [1, 1, 1], [1]
    model = build(from_dict(config))
    names = authors.their_names(model)
    state = model.state_dict()
    assert names["contexts.1.channel.blocks.0.spatial.kvr.weight"] == [
        f"latent_codec.y.channel_context.y1.1.att.{n}.weight" for n in ("key", "value", "receptance")]
    assert names["g_s.head.proj.weight"] == ["g_s.6.weight"]
    checkpoint = {}
    for ours, theirs in names.items():
        value = torch.randn_like(state[ours])
        if ours.endswith("taps.weight"):
            full = torch.randn(value.shape[0], value.shape[1] // 12, 5, 5)
            checkpoint[theirs[0]] = full
        elif ".shift.k" in ours:
            checkpoint[theirs[0]] = value.permute(2, 0, 1)[:, None]
        elif ours == "density.median":
            checkpoint[theirs[0]] = torch.randn(len(value), 1, 3)
        elif len(theirs) > 1:
            rows = [state[ours].shape[1]] * len(theirs)
            rows[0] = state[ours].shape[0] - sum(rows[1:])
            checkpoint.update(zip(theirs, value.split(rows)))
        else:
            checkpoint[theirs[0]] = value
    converted = authors.convert({f"module.{k}": v for k, v in checkpoint.items()}, model)
    model.load_state_dict(converted)
    key = "latent_codec.y.latent_codec.y2.context_prediction.weight"
    tap = converted["contexts.2.taps.weight"].view(64, 12, 32)
    assert torch.equal(tap[:, 0], checkpoint[key][:, :, 0, 1])  # (-2, -1) is the first odd tap
    assert torch.equal(converted["density.median"],
                       checkpoint["latent_codec.hyper.entropy_bottleneck.quantiles"][:, 0, 1])
    with torch.inference_mode():
        assert torch.isfinite(model.eval()(torch.rand(1, 3, 64, 64))["x_hat"]).all()
