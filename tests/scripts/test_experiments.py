"""The table of an experiment plan, from results that are on disk; and that the plans are recipes."""
import argparse
import importlib.util
import json
import tomllib
from pathlib import Path

import pytest

from linic.train import recipe

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "experiments").glob("*.toml"))


@pytest.fixture(scope="module")
def experiments():
    spec = importlib.util.spec_from_file_location("experiments", ROOT / "scripts" / "experiments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_every_run_of_a_plan_is_a_recipe_of_a_preset_and_has_a_name_of_its_own(path):
    from linic.models import PRESETS

    plan = tomllib.loads(path.read_text())
    names = [r["name"] for r in plan["runs"]]
    assert len(set(names)) == len(names)
    for run in plan["runs"]:
        chosen = recipe.load(ROOT / run.get("recipe", plan["recipe"]), {**plan.get("set", {}), **run.get("set", {})})
        assert chosen.model.preset in PRESETS
        low, high = chosen.quality.range
        assert all(low <= q <= high for q in run.get("judge", plan.get("judge", [])))


def write(folder, name, rows):
    (folder / name).mkdir()
    rows = [dict(zip(("quality", "bpp", "psnr", "loss"), row)) for row in rows]
    (folder / name / "result.json").write_text(json.dumps({"crops": 1000, "raw": rows, "ema": rows}))


def test_runs_of_mrt_are_compared_at_one_rate(experiments, tmp_path, capsys):
    (tmp_path / "plan.toml").write_text('judge = [25.0, 75.0]\n[[runs]]\nname = "a"\n[[runs]]\nname = "b"\n'
                                        'recipe = "recipes/b.toml"\nset = { seed = 1 }\n')
    for name, alex in (("a", 0.5), ("b", 0.4)):
        (tmp_path / name).mkdir()
        rows = [{"quality": q, "bpp": bpp, "psnr": psnr, "loss": 1.0, "lpips-alex": alex, "lpips-squeeze": 0.3}
                for q, bpp, psnr in ((25.0, 0.0059, 20.0), (75.0, 0.0236, 22.0))]
        (tmp_path / name / "result.json").write_text(json.dumps({"crops": 1000, "raw": rows, "ema": rows}))
    experiments.table(argparse.Namespace(plan=tmp_path / "plan.toml", out=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| a | 1,000 | 0.5000 | 0.3000 | 21.00 | 0.0236 | 1.0000 |  |",
                         "| b | 1,000 | 0.4000 | 0.3000 | 21.00 | 0.0236 | 1.0000 | recipes/b.toml, seed = 1 |"]


def test_runs_that_are_judged_at_some_qualities_are_compared_at_each(experiments, tmp_path, capsys):
    (tmp_path / "plan.toml").write_text('judge = [35.0, 75.0]\n[[runs]]\nname = "range"\n[[runs]]\nname = "only"\n'
                                        'set = { "quality.ends" = 0.0 }\n[[runs]]\nname = "missing"\n')
    write(tmp_path, "range", [(35.0, 0.4, 31.0, 1.0), (75.0, 0.8, 35.0, 2.0)])
    write(tmp_path, "only", [(75.0, 0.7, 35.0, 1.9)])
    experiments.table(argparse.Namespace(plan=tmp_path / "plan.toml", out=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| range | 1,000 | 35 | 0.4000 | 31.00 | 1.0000 | +0.00 % |  |",
                         "| range | 1,000 | 75 | 0.8000 | 35.00 | 2.0000 | +0.00 % |  |",
                         "| only | 1,000 | 75 | 0.7000 | 35.00 | 1.9000 | -5.00 % | quality.ends = 0.0 |"]
