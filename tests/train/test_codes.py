import pytest
import torch
from mrt_helpers import WEIGHTS, load, needs_weights, small_mrt, smooth

from linic.bench.perceptual import Measures
from linic.train import checkpoint, optimisers, speed
from linic.train.codes import Codebook, Codes, features

CHANGES = ("codes.squeeze=24", "codes.vgg=12", "codes.axes=8", "codes.examples=2", "codes.count=1")


class Crops:
    def batch(self, count, side):
        return smooth(count, side, 7).permute(0, 2, 3, 1).contiguous()


@pytest.fixture
def stage():
    r = load("mrt-xs-codes", *CHANGES)
    model = small_mrt().train()
    codes = Codes(r.codes, model, Measures(WEIGHTS), 1e-3)
    codes.prepare(Crops(), 0)
    step = speed.Step(model, optimisers.build(r.optimiser, model), r.optimiser.clip, r.loss)
    step.stage = codes
    return model, codes, step


def test_a_codebook_finds_clusters_and_is_seeded():
    torch.manual_seed(0)
    centres = 10 * torch.randn(6, 20)
    rows = centres[torch.arange(600) % 6] + 0.1 * torch.randn(600, 20)
    books = [Codebook(20, 4, 12) for _ in range(2)]
    for book in books:
        book.fit(rows, torch.Generator().manual_seed(1))
    code = books[0](rows.view(6, 100, 20))
    assert code.shape == (6, 100) and torch.equal(code, books[1](rows).view(6, 100))
    for i in range(12):             # no code holds rows of two clusters
        assert len(set((torch.arange(600) % 6)[(code.flatten() == i)].tolist())) <= 1


@needs_weights
@pytest.mark.parametrize("network, width", [("squeeze", 512), ("vgg", 896)])
@pytest.mark.parametrize("sides", [(64, 64), (96, 128), (160, 80)])
def test_features_are_a_row_a_patch(network, width, sides):
    x = smooth(2, 160)[:, :, :sides[0], :sides[1]]
    assert features(Measures(WEIGHTS), network, x).shape == (2, sides[0] // 16, sides[1] // 16, width)


@needs_weights
def test_a_code_is_of_the_patch_at_its_place():
    grey = torch.full((1, 3, 256, 256), 0.5)
    x = grey.clone()
    x[:, :, 112:128, 144:160] = torch.rand(1, 3, 16, 16)
    for network in ("squeeze", "vgg"):
        change = (features(Measures(WEIGHTS), network, x) - features(Measures(WEIGHTS), network, grey)).norm(dim=3)[0]
        row, column = ((change.sum(i) * torch.arange(16)).sum() / change.sum() for i in (1, 0))
        assert (float(row), float(column)) == pytest.approx((7, 9), abs=0.5), network


@needs_weights
def test_stage_1_teaches_the_tokens_codes_and_heads_are_no_part_of_the_model(stage):
    model, codes, step = stage
    names = list(model.state_dict())
    x, quality = smooth(2, 128, 7), torch.tensor([40.0, 90.0])
    rows = [step(x, quality, 2e-3).tolist() for _ in range(25)]
    assert len(rows[0]) == 5 + len(codes.names)
    assert rows[-1][5] < 0.9 * rows[0][5] and rows[-1][6] < 0.9 * rows[0][6]        # cross-entropies
    assert list(model.state_dict()) == names and not any("head" in n for n in names)
    assert not model.decoder.pairs[-1]._forward_hooks
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())


@needs_weights
def test_later_the_term_comes_on_top_of_the_loss_of_the_phase(stage):
    model, codes, _ = stage
    x, quality, loss = smooth(1, 64), torch.tensor([50.0]), load("mrt-xs").loss
    found = {}
    for first, later in ((False, 0.0), (False, 0.5), (True, 0.0)):
        codes.first, codes.numbers = first, load("mrt-xs-codes", *CHANGES, f"codes.later={later}").codes
        torch.manual_seed(0)
        terms, beside, numbers = codes.objective(model, x, quality, loss, None)
        assert beside is None
        found[first, later] = float(terms.loss.detach()), float(numbers[:2].mean())
    plain, entropy = found[False, 0.0]
    assert found[False, 0.5][0] == pytest.approx(plain + 0.5 * entropy, rel=0.01)
    assert found[True, 0.0][0] < plain + entropy            # the error of a picture a quarter as large is smaller


@needs_weights
def test_codes_are_made_once_and_kept_in_the_folder_of_the_run(tmp_path):
    r, file = load("mrt-xs-codes", *CHANGES), tmp_path / "run" / "codes.safetensors"
    first, second = (Codes(r.codes, small_mrt(), Measures(WEIGHTS), 1e-3) for _ in range(2))
    first.prepare(Crops(), 0, file)
    second.prepare(None, 0, file)                           # no crops are drawn
    x = smooth(2, 64)
    assert all(torch.equal(a, b) for a, b in zip(first.targets(x), second.targets(x)))
    assert checkpoint.load(file)[1] == {"squeeze": 24, "vgg": 12, "axes": 8, "examples": 2}
    tensors = first.tensors("codes")
    third = Codes(r.codes, small_mrt(), Measures(WEIGHTS), 1e-3)
    third.restore("codes", tensors)
    assert torch.equal(third.targets(x)[0], first.targets(x)[0])
