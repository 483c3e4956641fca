"""Dead hidden units: seen, counted, and given a new start that changes nothing at first."""
import pytest
import torch
from mrt_helpers import small_mrt

from linic.models import build
from linic.models.mrt import Residual
from linic.train import dead
from small_models import small


@pytest.fixture(params=["lalic", "mrt"])
def model(request):
    torch.manual_seed(0)
    model = build(small("lalic-xs")) if request.param == "lalic" else small_mrt()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def pictures(side=64):
    return [*torch.randint(0, 256, (2, side + 3, side, 3), dtype=torch.uint8)]


def kill(layer, units):
    """Weights that no input brings above zero."""
    with torch.no_grad():
        layer.norm.weight.zero_()
        layer.norm.bias.fill_(1.0)
        first = dead._ends(layer)[0]
        if layer_shift := getattr(layer, "shift", None):
            for p in (layer_shift.k1, layer_shift.k3, layer_shift.k5):
                p.zero_()
            layer_shift.alpha.fill_(1.0)
        first.weight[units] = -1.0
        if first.bias is not None:
            first.bias[units] = -100.0
    return layer


def layer_of(model, name):
    return dict(model.named_modules())[name]


def first_name(model):
    names = [n for n, m in model.named_modules() if isinstance(m, Residual if model.config.family == "mrt"
                                                               else dead.ChannelMix)]
    return names[0]


def test_dead_units_are_seen_and_the_mode_stays(model):
    name = first_name(model)
    kill(layer_of(model, name), slice(0, 3))
    model.train()
    shares = dead.look(model, pictures(), (10.0, 90.0))
    assert model.training
    assert (shares[name][:3] == 0).all() and (shares[name][3:] > dead.EVER).any()
    assert dead.share(shares) > 0 and dead.share({}) == 0
    lost, works = dead.by_layer(shares)[name]
    assert lost >= round(3 / len(shares[name]), 4) and 0 < works < 1
    assert all(((s >= 0) & (s <= 1)).all() for s in shares.values())


def test_revived_units_work_again_and_change_nothing_at_first(model):
    name, quality = first_name(model), (50.0,)
    layer = kill(layer_of(model, name), slice(0, 3))
    some = pictures()
    seen = {name: dead.look(model, some, quality)[name]}
    x = some[0][:64].permute(2, 0, 1)[None].float() / 255
    before = model.eval()(x, torch.tensor([50.0]))["x_hat"]
    lost = int((seen[name] < dead.EVER).sum())
    done = dead.revive(model, build(model.config), seen)
    assert done == [f"{name}: {lost} of {len(seen[name])} units"]
    after = model(x, torch.tensor([50.0]))["x_hat"]
    assert (after - before).abs().max() < 0.1          # SiLU is not quite zero below
    first, last, _ = dead._ends(layer)
    assert (last.weight[:, :3] == 0).all() and not (first.weight[:3] == -1).all()
    assert dead.revive(model, build(model.config), {name: torch.ones_like(seen[name])}) == []


def test_a_layer_that_has_lost_all_begins_anew_and_others_are_left_alone(model):
    name = first_name(model)
    layer = kill(layer_of(model, name), slice(None))
    units = dead._ends(layer)[2]
    with torch.no_grad():
        dead._ends(layer)[0].weight[:units] = -1.0
    seen = {name: torch.zeros(units)}
    assert dead.revive(model, build(model.config), seen, within="nowhere.") == []
    fresh = build(model.config)
    dead.revive(model, fresh, seen)
    wanted = dict(fresh.named_modules())[name].state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in layer.state_dict().items())


def test_where_the_fused_path_would_run_the_same_units_are_seen():
    model = build(small("lalic-xs"))
    assert dead.look(model, pictures(), (50.0,)).keys() == {
        n for n, m in model.named_modules() if isinstance(m, dead.ChannelMix)}
