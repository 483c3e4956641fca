import math
from pathlib import Path

import pytest
import torch

from linic.errors import RecipeError, UsageError
from linic.train import recipe as recipes
from linic.train.command import seconds
from linic.train.loop import draw_quality

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
TEXT = (ROOT / "recipes" / "lalic-xs.toml").read_text()


def changed(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_parses_and_its_first_lines_say_machine_time_result_and_command(path):
    assert recipes.load(path).model.preset
    head = [line for line in path.read_text().splitlines()[:6] if line.startswith("#")]
    for word in ("Machine:", "Time:", "Result:", f"Run: linic train recipes/{path.name} "):
        assert any(word in line for line in head), word


@pytest.mark.parametrize("old, new, message", [
    ("clip = 2.0", "clip = 2.0\nclipp = 1", "a.toml: unknown key optimiser.clipp. Did you mean optimiser.clip?"),
    ("[model]", "[model]\nlr = 1", "a.toml: unknown key model.lr. Did you mean optimiser.lr?"),
    ("crop = 128", "crop = 128\ncrops = 1", r"a.toml: unknown key phases\[0\].crops. Did you mean phases.crop?"),
    ("seed = 0", "seed = 0\nqwxz = 1", "a.toml: unknown key qwxz.$"),
    ("lr = 2e-3\n", "", "a.toml: key optimiser.lr is missing"),
    ("lr = 2e-3\n", 'lr = "2e-3"\n', "a.toml: optimiser.lr is '2e-3', expected a number"),
    ("lr = 2e-3\n", "lr = nan\n", "a.toml: optimiser.lr is nan, expected a number"),
    ("seed = 0", "seed = 0.5", "a.toml: seed is 0.5, expected a whole number"),
    ("bf16 = ", "bf16 = true # ", "a.toml: model.bf16 is True, expected 'off' or 'free' or 'all'"),
    ("betas = [0.9, 0.98]", "betas = [0.9]", r"a.toml: optimiser.betas is \[0.9\], expected a list of 2 x a number"),
    ('shape = "cosine"', 'shape = "step"', "a.toml: schedule.shape is 'step', expected 'cosine' or 'linear'"),
    ('shape = "cosine"', 'shape = "linear"', "a.toml: schedule.decay belongs to a linear schedule"),
    ("start = 0.35", "start = 0.9", "a.toml: phases start at"),
    ("share = 0.35", "share = 0.45", "a.toml: the shares of data.pools must be 1 in sum"),
    ("range = [-4.0, 104.0]", "range = [104, -4]", r"a.toml: quality.range is \[104.0, -4.0\]: the smaller"),
    ('shape = "cosine"', 'shape = "steps"', "a.toml: schedule.milestones belong to shape steps"),
    ('shape = "cosine"', 'shape = "cosine"\nmilestones = [0.5]', "a.toml: schedule.milestones belong to shape steps"),
    ('shape = "cosine"', 'shape = "cosine"\nsteps = 0', "a.toml: schedule: drop lies between 0 and 1, steps above 0"),
    ("exponent = 0.35", "exponent = 0.35\nlambda = 0.01", "a.toml: one of .quality. and loss.lambda is needed"),
    ("exponent = 0.35", 'distortion = "ssim"', "a.toml: loss.distortion is 'ssim', expected 'mse' or 'ms-ssim'"),
    ("exponent = 0.35", "lamda = 0.01", "a.toml: unknown key loss.lamda. Did you mean loss.lambda?"),
    ("transpose = 0.0", "transpose = 0.0\npermute = 2", "a.toml: data.permute is 2.0: a share, 0 to 1"),
    ("transpose = 0.0", "transpose = 0.0\nnoise = {share = 0.5, sigma = [2, 1]}", r"a.toml: data.noise.sigma is \["),
    ("transpose = 0.0", "transpose = 0.0\nnoise = {share = 0.5, sigma = [1.0, 2.0], pools = [0.9]}",
     "a.toml: data.noise.pools must be scales of data.pools"),
    ("[model]", "[model", "a.toml: not TOML"),
])
def test_a_wrong_recipe_names_file_and_key(old, new, message):
    with pytest.raises(RecipeError, match=message):
        recipes.parse(changed(old, new), "a.toml")


def test_stages_and_critics_of_mrt_need_their_tables_and_go_without_each_other():
    text = (ROOT / "recipes" / "mrt-xs-codes.toml").read_text()
    critic = (ROOT / "recipes" / "mrt-xs-critic.toml").read_text()
    assert recipes.parse(text).codes.later == 0 and recipes.parse(text).phases[0].stage == "codes"
    assert recipes.parse(critic).critic.width > 0 and recipes.parse(critic).intervals.gate_seconds == 300
    table = critic[critic.index("[critic]"):critic.index("[schedule]")]
    for wrong, message in (
            (text.replace('stage = "codes"', ""), r"\[codes\] needs a phase with stage"),
            (text.replace('stage = "codes"', 'stage = "codes"\nperceptual = true'), "a phase for codes cannot be"),
            (text.replace('stage = "codes"', 'stage = "code"'), r"phases\[0\].stage is 'code', expected 'picture' or"),
            (text.replace("axes = 64", "axes = 1000"), "codes: axes are at most 512"),
            (text.replace("[schedule]", table + "[schedule]"), r"\[critic\] trains the decoder alone"),
            (critic.replace("start = 0.0\n", 'start = 0.0\nstage = "codes"\n'), r'stage = "codes" need \[codes\]'),
            (critic.replace("rise = 0.1", "rise = 2.0"), "critic: weights must not be below 0, rise is a share"),
            (critic.replace("gate_seconds = 300", "gate_seconds = 0"), "intervals must be above 0")):
        with pytest.raises(RecipeError, match=message):
            recipes.parse(wrong, "a.toml")


def test_colour_changes_are_off_unless_asked_for():
    assert recipes.parse(TEXT).data.colour is None
    asked = "\n[data.colour]\nshare = 0.5\ngamma = [0.8, 1.25]\ngains = [0.85, 1.15]\n"
    colour = recipes.parse(TEXT + asked).data.colour
    assert colour == recipes.Colour(0.5, (0.8, 1.25), (0.85, 1.15))


def test_a_recipe_that_cannot_be_read_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere\.toml: cannot be read"):
        recipes.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("schedule, values", [
    (recipes.Schedule("cosine", 0.1), {0: 0.001, 0.05: 0.501 * 0.5 * (1 + math.cos(0.05 * math.pi)), 0.5: 0.5, 1: 0}),
    (recipes.Schedule("linear", 0.1, 0.3), {0: 0.001, 0.05: 0.501, 0.1: 1, 0.7: 1, 0.85: 0.5, 1: 0, 1.1: 0}),
    (recipes.Schedule("linear", 0.0, 1.0), {0: 1, 0.25: 0.75}),
    (recipes.Schedule("steps", 0.1, milestones=(0.5, 0.9)), {0: 0.001, 0.2: 1, 0.5: 0.1, 0.89: 0.1, 0.9: 0.01}),
], ids=["cosine", "linear", "linear from the start", "steps"])
def test_the_learning_rate_follows_progress(schedule, values):
    for progress, factor in values.items():
        assert schedule.factor(progress) == pytest.approx(factor, abs=1e-9), progress
    start = {"cosine": math.inf, "linear": 1 - schedule.decay, "steps": 0.5}[schedule.shape]
    assert schedule.decay_start == pytest.approx(start)


def test_a_recipe_can_be_changed_by_dotted_key():
    changes = dict(map(recipes.change, ("optimiser.lr=1e-3", "phases.2.crop = 512", "model.preset=lalic-s",
                                        "data.noise={share = 0.2, sigma = [0.5, 2.5]}", "schedule.steps=1_000")))
    r = recipes.parse(TEXT, "a.toml", changes)
    assert (r.optimiser.lr, r.phases[2].crop, r.model.preset, r.schedule.steps) == (1e-3, 512, "lalic-s", 1000)
    assert r.data.noise == recipes.Noise(0.2, (0.5, 2.5))
    for changes, message in (({"loss.lamda": 1}, "unknown key loss.lamda"), ({"seed.x": 1}, "no place for seed.x"),
                             ({"phases.9.crop": 64}, "no place for phases.9"), ({"seed": "x"}, "seed is 'x'")):
        with pytest.raises(RecipeError, match=f"a.toml: {message}"):
            recipes.parse(TEXT, "a.toml", changes)
    with pytest.raises(RecipeError, match=r"--set seed: write KEY=VALUE"):
        recipes.change("seed")


def test_the_papers_recipe_takes_its_lambda_as_a_choice():
    path = ROOT / "recipes" / "lalic-paper.toml"
    assert recipes.load(path, {"loss.lambda": 0.0483}).loss == recipes.Loss(lambda_=0.0483)
    assert [recipes.load(path).schedule.factor(p) for p in (0, 0.89, 0.9)] == pytest.approx([1, 1, 0.1])


def test_phases_follow_progress():
    recipe = recipes.parse(TEXT)
    assert [(recipe.phase_at(p).crop, recipe.phase_at(p).batch) for p in (0, 0.349, 0.35, 0.85, 0.999)] == [
        (128, 8), (128, 8), (128, 16), (256, 4), (256, 4)]


def test_qualities_are_even_with_the_asked_share_at_each_end():
    q = draw_quality(recipes.Quality((-4.0, 104.0), 0.1), 20000, "cpu")
    assert q.dtype == torch.float32 and q.min() == -4 and q.max() == 104
    assert (q == -4).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (q == 104).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert q.mean().item() == pytest.approx(50, abs=1)


@pytest.mark.parametrize("text, value", [("90s", 90), ("60m", 3600), ("1.5h", 5400)])
def test_a_budget_has_a_unit(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["60", "", "m", "-5m", "nanh", "5 days", "infs"])
def test_a_budget_that_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match=r"write 90s, 60m or 1\.5h"):
        seconds(text)
