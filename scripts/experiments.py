"""Compares ways of training in equal CPU time, each in one thread: what a busy machine does to one, it does to all.

    python scripts/experiments.py run experiments/attention.toml --data PICTURES --valid OTHERS --out FOLDER --jobs 2
    python scripts/experiments.py table experiments/attention.toml --out FOLDER

The file names a recipe, a budget in CPU time and the runs: what each `set`s differently, by dotted key of the recipe;
a run may name a recipe of its own. Plans for MRT need --measures, and their table compares at one rate.
Every run is judged by its last weights on all PNGs of --valid and the plan's loss: estimated rates, hard rounding
(train/evaluate.py); at the qualities in `judge` (of the plan or a run), else at six. With `judge` the table has a row
for each of them instead of a BD-rate. `init`, of the plan or a run: as of `linic train`.
`run` leaves out what is done and goes on with what was broken off; `table` prints Markdown, the first run as the
reference. A difference below that of two seeds is none.
"""

import argparse
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

BPP = 0.0118                    # at which runs of MRT are compared
QUALITIES = (0.0, 10.0, 35.0, 60.0, 90.0, 100.0)


def read(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        plan = tomllib.load(f)
    return plan


def one(args: argparse.Namespace) -> None:
    """A run of the plan, in this process."""
    from linic.train import data, evaluate, recipe  # noqa: I001 (before torch: train/__init__.py says why)
    from linic.train.command import seconds
    from linic.train.loop import train

    import torch
    from safetensors.torch import load_file

    plan = read(args.plan)
    run = next(r for r in plan["runs"] if r["name"] == args.name)
    out = args.out / args.name
    out.mkdir(parents=True, exist_ok=True)
    chosen = recipe.load(run.get("recipe", plan["recipe"]), {**plan.get("set", {}), **run.get("set", {})})
    status = train(chosen, data=args.data, valid=args.valid, out=out, cache=args.out / "pictures", threads=1,
                   budget_s=seconds(run.get("budget", plan["budget"])), clock=time.process_time, resume=True,
                   init=None if (out / "state.safetensors").exists() else run.get("init", plan.get("init")),
                   device="cpu", measures=args.measures)
    if status["state"] != "done":
        return
    from linic.models import build
    from linic.train.loop import networks_of
    networks, _ = networks_of(recipe.load(plan["recipe"], plan.get("set", {})), args.measures, "cpu")
    loss = recipe.load(plan["recipe"], plan.get("set", {})).loss     # one for all, whatever a run trains for
    qualities = run.get("judge", plan.get("judge", QUALITIES))
    judged = [torch.from_numpy(data.read_picture(p)) for p in sorted(args.valid.glob("*.png"))]
    result: dict[str, Any] = {k: status[k] for k in ("step", "crops", "cpu_s", "skipped", "torch")}
    for weights in ("raw", "ema"):
        model = build(chosen.model.preset).eval()
        model.load_state_dict(load_file(out / f"{weights}.safetensors"))
        with torch.no_grad():
            rows = evaluate.evaluate(model, judged, qualities, loss, measures=networks)
        result[weights] = rows
    (out / "result.json").write_text(json.dumps(result, indent=1))
    for name in ("state", "best", "trunk"):
        (out / f"{name}.safetensors").unlink(missing_ok=True)


def run(args: argparse.Namespace) -> None:
    waiting = [r["name"] for r in read(args.plan)["runs"] if not (args.out / r["name"] / "result.json").exists()]
    args.out.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        for name in [n for n, p in running.items() if p.poll() is not None]:
            print(name, "ended with", running.pop(name).returncode, flush=True)
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            with (args.out / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen([sys.executable, __file__, "one", str(args.plan), "--name", name,
                                                  "--data", str(args.data), "--valid", str(args.valid),
                                                  "--out", str(args.out),
                                                  *(["--measures", str(args.measures)] if args.measures else [])],
                                                 stderr=log, stdout=log)
            print(name, "started", flush=True)
            time.sleep(args.stagger)
        time.sleep(1)


def table(args: argparse.Namespace) -> None:
    from linic.bench.anchors import Curve
    from linic.bench.bdrate import bd_rate

    plan = read(args.plan)
    done = [args.out / r["name"] / "result.json" for r in plan["runs"]]
    if any("lpips-alex" in json.loads(p.read_text())["raw"][0] for p in done if p.exists()):
        return at_one_rate(args, plan)
    if "judge" in plan:
        return by_quality(args, plan)
    curves: list[Curve] = []
    print("| run | crops | loss | of it EMA | BD-rate | what differs |\n|---|---|---|---|---|---|")
    for r in plan["runs"]:
        path = args.out / r["name"] / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        mean = {w: sum(row["loss"] for row in result[w]) / len(result[w]) for w in ("raw", "ema")}
        rows = result["raw"]
        curves.append(Curve(r["name"], [row["bpp"] for row in rows], [row["psnr"] for row in rows]))
        bd = bd_rate(curves[-1], curves[0]).percent
        differs = ", ".join(f"{k} = {v}" for k, v in r.get("set", {}).items())
        print(f"| {r['name']} | {result['crops']:,} | {mean['raw']:.4f} | {mean['ema']:.4f} | {bd:+.1f} % "
              f"| {differs} |")


def by_quality(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    first: dict[float, float] = {}              # loss of the first run that was judged at a quality
    print("| run | crops | quality | bpp | PSNR | loss | against the first | what differs |\n" + "|---" * 8 + "|")
    for r in plan["runs"]:
        path = args.out / r["name"] / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        differs = ", ".join(f"{k} = {v}" for k, v in r.get("set", {}).items())
        for row in result["raw"]:
            more = row["loss"] / first.setdefault(row["quality"], row["loss"]) - 1
            print(f"| {r['name']} | {result['crops']:,} | {row['quality']:g} | {row['bpp']:.4f} | {row['psnr']:.2f} "
                  f"| {row['loss']:.4f} | {100 * more:+.2f} % | {differs} |")


def at_one_rate(args: argparse.Namespace, plan: dict[str, Any]) -> None:
    """For MRT: between the judged qualities, at BPP. EMA weights, which ship."""
    import numpy as np

    print(f"| run | crops | LPIPS(alex) at {BPP} | LPIPS(squeeze) | PSNR | bpp at the middle quality | loss "
          "| what differs |\n" + "|---" * 8 + "|")
    for r in plan["runs"]:
        path = args.out / r["name"] / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        rows = sorted(result["ema"], key=lambda row: row["bpp"])
        ln_bpp = np.log([row["bpp"] for row in rows])
        alex, squeeze, psnr = (float(np.interp(np.log(BPP), ln_bpp, [row[k] for row in rows]))
                               for k in ("lpips-alex", "lpips-squeeze", "psnr"))
        middle = sorted(rows, key=lambda row: row["quality"])[len(rows) // 2]
        loss = sum(row["loss"] for row in rows) / len(rows)
        differs = ", ".join([*([r["recipe"]] if "recipe" in r else []),
                             *(f"{k} = {v}" for k, v in r.get("set", {}).items())])
        print(f"| {r['name']} | {result['crops']:,} | {alex:.4f} | {squeeze:.4f} | {psnr:.2f} | {middle['bpp']:.4f} "
              f"| {loss:.4f} | {differs} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sub = parser.add_subparsers(required=True)
    for name, do in (("run", run), ("one", one), ("table", table)):
        command = sub.add_parser(name)
        command.set_defaults(do=do)
        command.add_argument("plan", type=Path)
        command.add_argument("--out", type=Path, required=True)
        if do is not table:
            command.add_argument("--data", type=Path, required=True)
            command.add_argument("--valid", type=Path, required=True)
            command.add_argument("--measures", type=Path, help="networks of perceptual losses, as of linic train")
        if do is run:
            command.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
            command.add_argument("--stagger", type=float, default=20, help="seconds between two starts")
        if do is one:
            command.add_argument("--name", required=True)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
