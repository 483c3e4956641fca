#!/usr/bin/env python3
"""Training on a machine that is lent for half an hour: one process that outlives the calls, weights in small parts.

    lease.py rehearse [--recipe R] [--data PICTURES] [--carry DIR ...]          at home, on the CPU, before the lease
    lease.py start --recipe R --data DIR --work DIR [--init FILE] [--measures DIR] [--device cuda]
    lease.py add --data-from DIR --work DIR                                     further shards, while it runs
    lease.py poll --work DIR --seconds N --out DIR [--weights ema|raw|trunk|best]
    lease.py end --work DIR --in SECONDS                                        move the end of the run
    lease.py join PARTS -o FILE                                                 at home: parts -> checkpoint

Runs from a source tree with torch, numpy, pillow and safetensors (triton on a GPU) alone; nothing is installed.
Everything lies in --work, outside the tree that travels:
    tree/ the source as it started    data/ the watched shards    run/ weights and status (train/checkpoint.py)
    log    end: seconds since 1970    pid
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAVELS = ("src", "recipes", "scripts")
LIMIT_MIB = 64                  # of the tree that travels, carried folders included
PICTURES = {".avif", ".jpg", ".jpeg", ".png", ".webp"}
NO_AVIF = """Pillow {version} of {where} cannot read AVIF. Carry another one in FOLDER and pass --site FOLDER:
  pip download --no-deps --only-binary=:all: --python-version {python} --implementation cp \\
      --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d FOLDER 'pillow>=11.3'"""


class Refused(Exception):
    """The message says what is wrong and what to do."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    for folder in (getattr(args, "site", None), ROOT / "src"):
        if folder:
            sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return args.run(args) or 0
    except Refused as error:
        print(f"lease: {error}", file=sys.stderr, flush=True)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[Any], int | None], *options: tuple[str, dict[str, Any]]) -> None:
        sub = commands.add_parser(run.__name__, help=run.__doc__)
        for name, settings in options:
            sub.add_argument(name, **settings)
        sub.set_defaults(run=run)

    folder, needed = {"type": Path}, {"type": Path, "required": True}
    what = [("--recipe", needed), ("--data", needed), ("--work", needed), ("--valid", folder),
            ("--init", {"type": Path, "help": "checkpoint, or folder of its parts"}),
            ("--measures", {"type": Path, "help": "folder of the networks of perceptual losses (MRT)"}),
            ("--site", {"type": Path, "help": "folder of wheels, unpacked or not: first on the path"}),
            ("--device", {"default": "cuda"})]
    command(start, *what,
            ("--budget", {"type": float, "default": 24 * 60, "help": "seconds until the end, which `end` moves"}),
            ("--speed", {"default": "ladder", "help": "as of linic train"}))
    command(check, *what, ("--torch-kernels", {"action": "store_true"}))
    command(supervise, *what, ("--speed", {"default": "ladder"}))
    command(poll, ("--work", needed), ("--out", folder), ("--seconds", {"type": float, "default": 0.0}),
            ("--weights", {"choices": ("ema", "raw", "trunk", "best")}), ("--site", folder))
    command(add, ("--work", needed), ("--data-from", needed))
    command(end, ("--work", needed), ("--in", {"type": float, "required": True, "dest": "seconds"}))
    command(join, ("parts", {"type": Path, "help": "folder or manifest"}), ("-o", {**needed, "dest": "out"}))
    command(rehearse, ("--recipe", {"type": Path, "default": ROOT / "recipes" / "lalic-s.toml"}),
            ("--data", folder), ("--carry", {"type": Path, "nargs": "*", "default": []}), ("--measures", folder),
            ("--limit", {"type": float, "default": 600.0, "help": "seconds after which it has failed"}))
    return parser


# --- on the lent machine ----------------------------------------------------------------------------------------------


def start(args: Any) -> None:
    """copy the tree and the data, try everything once, start the run"""
    work = args.work.resolve()
    if _alive(work):
        raise Refused(f"{work}: a run is alive there")
    if (work / "run").exists():
        raise Refused(f"{work}/run holds a run: choose another --work")
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name in TRAVELS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (work / "data").mkdir(parents=True, exist_ok=True)
    shards = [f for f in sorted(args.data.iterdir()) if f.suffix.lower() in PICTURES | {".tar"}]
    if not shards:
        raise Refused(f"{args.data}: no shards (.tar) and no pictures")
    for shard in shards:
        shutil.copyfile(shard, work / "data" / shard.name)
    kept: dict[str, Path | None] = {"valid": args.valid, "site": args.site, "init": args.init,
                                    "measures": args.measures}
    for name, source in kept.items():           # the checkout is replaced at the next call
        if name == "init" and source and source.is_dir():
            kept[name] = work / "init.safetensors"
            join(SimpleNamespace(parts=source, out=kept[name]))
        elif source and source.is_dir():
            shutil.copytree(source, work / name, dirs_exist_ok=True)
            kept[name] = work / name
        elif source and source.exists():
            kept[name] = Path(shutil.copy(source, work / f"{name}{source.suffix}"))
        elif source:
            raise Refused(f"--{name} {source}: not there")
    for wheel in (work / "site").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(work / "site")
    recipe = args.recipe.resolve()
    inside = recipe.is_relative_to(ROOT) and recipe.relative_to(ROOT).parts[0] in TRAVELS
    recipe = tree / recipe.relative_to(ROOT) if inside else Path(shutil.copy(recipe, work))
    common = ["--recipe", recipe, "--data", work / "data", "--work", work, "--device", args.device]
    for name, path in kept.items():
        common += [f"--{name}", path] if path else []
    lease = [sys.executable, tree / "scripts" / "lease.py"]
    code = subprocess.run([*lease, "check", *common], env=_environment(work)).returncode
    if code not in (0, 1):      # the step died; the ladder will find out why and do without
        print(f"the step failed (code {code}): once more with torch's own kernels", flush=True)
        code = subprocess.run([*lease, "check", *common, "--torch-kernels"], env=_environment(work)).returncode
    if code:
        raise Refused("the dry run failed: nothing was started")
    _write(work / "end", str(time.time() + args.budget))
    with open(work / "log", "a") as log:
        process = subprocess.Popen([*lease, "supervise", *common, "--speed", args.speed], env=_environment(work),
                                   cwd=work, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    _write(work / "pid", str(process.pid))
    print(f"started: process {process.pid}, end in {args.budget:.0f} s, log {work / 'log'}", flush=True)


def check(args: Any) -> int:
    """(used by start) whatever can fail at once: packages, AVIF, recipe, weights, device, one step"""
    began = time.time()
    import numpy
    import PIL
    import safetensors
    import torch
    from PIL import features

    from linic.errors import LinicError
    from linic.kernels.choice import choose
    from linic.models import build
    from linic.train import checkpoint, data, ladder, loop, optimisers, recipe, speed
    from linic.train.codes import Codes
    from linic.train.critic import Critic

    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, numpy {numpy.__version__}, "
          f"pillow {PIL.__version__}, safetensors {safetensors.__version__}", flush=True)
    r, sources = recipe.load(args.recipe), data.find_sources(args.data)
    first = next(((name, content) for s in sources for name, content, _ in s.read()), None)
    if first is None:
        raise Refused(f"{args.data}: no pictures")
    if first[0].lower().endswith(".avif") and not features.check("avif"):
        raise Refused(NO_AVIF.format(version=PIL.__version__, where=sys.executable,
                                     python=".".join(map(str, sys.version_info[:2]))))
    import io
    print(f"{len(sources)} sources, {first[0]}: {data.read_picture(io.BytesIO(first[1])).shape}", flush=True)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Refused("no CUDA device here")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "kernels:",
          {name: choose(name, device.type, torch.float32, None) for name in ("biwkv", "dwconv5")}, flush=True)
    try:
        networks, judge = loop.networks_of(r, args.measures, args.device)
    except LinicError as error:
        raise Refused(f"{error} (--measures)") from error
    if r.critic and not args.init:
        raise Refused(f"{args.recipe} has a critic: it needs --init")
    model = build(r.model.preset).to(device).train()
    if args.init:
        missing, extra = checkpoint.initialise(model, args.init)
        print(f"{args.init}: {len(missing)} tensors not in it, {len(extra)} not used", flush=True)
    if args.torch_kernels:
        ladder.use_backends(dict.fromkeys(ladder.OPERATORS, "torch"), args.device)
    try:
        model.set_bf16(r.model.bf16)
        critic = Critic(r.critic, model, r.optimiser.lr) if r.critic else None          # freezes what it does not train
        step = speed.Step(model, optimisers.build(r.optimiser, model), r.optimiser.clip, r.loss)
        step.judge = judge
        step.stage = critic or (Codes(r.codes, model, networks, r.optimiser.lr) if r.codes else None)
        side = max(r.phases[0].crop, 96 if judge else 0)        # of perceptual terms at least
        x = torch.rand(1, side, side, 3, device=device).permute(0, 3, 1, 2)
        loss = float(step(x, torch.full((1,), 50.0, device=device), 0.0)[0])
    except Exception:
        traceback.print_exc()
        return 3
    if not loss < float("inf"):
        raise Refused(f"the loss of one step is {loss}")
    print(f"dry run: one step of {r.model.preset}, loss {loss:.3f}; {time.time() - began:.0f} s", flush=True)
    return 0


def supervise(args: Any) -> int:
    """(used by start) the run; one that dies goes on from its newest state, more carefully"""
    run, code = args.work / "run", 1
    for speed in (args.speed, "eager", "safe"):
        going_on = (run / "state.safetensors").exists()
        command = [sys.executable, "-m", "linic.train", args.recipe, "--data", args.data, "--out", run,
                   "--budget", f"{max(1.0, float((args.work / 'end').read_text()) - time.time()):.0f}s",
                   "--end-file", args.work / "end", "--cache", args.work / "pictures", "--device", args.device,
                   "--speed", speed]
        command += ["--valid", args.valid] if args.valid else []
        command += ["--measures", args.measures] if args.measures else []
        command += ["--resume"] if going_on else ["--init", args.init] if args.init else []
        print(f"lease: speed {speed}{', going on' if going_on else ''}", flush=True)
        code = subprocess.run(list(map(str, command)), env=_environment(args.work)).returncode
        if code in (0, 2) or time.time() > float((args.work / "end").read_text()):      # 2: nothing a retry would cure
            break
        print(f"lease: the run ended with code {code}", flush=True)
    print(f"lease: over, code {code}", flush=True)
    return code


def poll(args: Any) -> None:
    """wait, show how the run stands, put log, status and weights into --out"""
    until = time.time() + args.seconds
    while _alive(args.work) and time.time() < until:
        time.sleep(min(1.0, max(0.0, until - time.time())))
    log, status = args.work / "log", args.work / "run" / "status.json"
    text = log.read_text(errors="replace") if log.exists() else ""
    print("\n".join(text.splitlines()[-30:]))
    if status.exists():
        now = json.loads(status.read_text())
        print(f"{'running' if _alive(args.work) else 'over'}: {now['state']}, {100 * now['progress']:.1f} %, step "
              f"{now['step']}, {now['crops']} crops, {now['pictures']} pictures, best {now['best']}", flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "log").write_text(text[-(1 << 20):])
        if status.exists():
            shutil.copyfile(status, args.out / "status.json")
    if args.out and args.weights:
        from linic.train import parts

        # Until the decay begins, the raw weights are the trunk.
        wanted = {"trunk": ("trunk", "raw"), "best": ("best", "ema"), "ema": ("ema",), "raw": ("raw",)}[args.weights]
        found = [p for p in (args.work / "run" / f"{name}.safetensors" for name in wanted) if p.exists()]
        if not found:
            print(f"no {args.weights} weights yet: they are written every few minutes")
        else:
            note = "" if found[0].stem == args.weights else f" (no {args.weights} yet)"
            manifest = parts.split(found[0], args.out)
            print(f"{found[0].stem}{note}: {manifest['bytes'] / 1e6:.1f} MB in {len(manifest['parts'])} parts, "
                  f"{manifest['about']}", flush=True)


def add(args: Any) -> None:
    """move further shards into the watched folder"""
    shards = sorted(args.data_from.glob("*.tar"))
    if not shards:
        raise Refused(f"{args.data_from}: no .tar there")
    for shard in shards:
        beside, there = args.work / "data" / f".{shard.name}.tmp", args.work / "data" / shard.name
        if there.exists():
            print(f"{shard.name}: is there already")
            continue
        shutil.copyfile(shard, beside)
        before = time.time() - 60               # whole by now: nobody need wait whether it still grows
        os.utime(beside, (before, before))
        os.replace(beside, there)
        print(f"{shard.name}: {there.stat().st_size / 1e6:.1f} MB", flush=True)


def end(args: Any) -> None:
    """the run ends so many seconds from now"""
    _write(args.work / "end", str(time.time() + args.seconds))
    status = args.work / "run" / "status.json"
    done = json.loads(status.read_text())["progress"] if status.exists() else 0.0
    print(f"end in {args.seconds:.0f} s; {100 * done:.1f} % were done. The rate falls to zero until then, from where "
          "it stands if the decay has begun.", flush=True)


def join(args: Any) -> None:
    """verify parts and make a checkpoint of them"""
    from linic.errors import LinicError
    from linic.train import parts

    try:
        about = parts.join(args.parts, args.out)
    except LinicError as error:
        raise Refused(str(error)) from error
    print(f"{args.out}: {about}")


def _environment(work: Path) -> dict[str, str]:
    paths = [str(work / "tree" / "src"), os.environ.get("PYTHONPATH", "")]
    if (work / "site").exists():
        paths.insert(0, str(work / "site"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}


def _alive(work: Path) -> bool:
    try:
        pid = int((work / "pid").read_text())
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ValueError):
        return False


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


# --- at home ----------------------------------------------------------------------------------------------------------

# As sitecustomize.py on PYTHONPATH it stands in every Python of the rehearsal: packages that the five need may be
# imported, all others are not there.
BLOCKER = '''
import importlib.metadata as m, re, sys
need, todo = set(), ["torch", "triton", "numpy", "pillow", "safetensors"]
while todo:
    name = re.sub("[-_.]+", "-", todo.pop()).lower()
    if name not in need:
        need.add(name)
        try:
            todo += [re.split("[^A-Za-z0-9._-]", r)[0] for r in m.requires(name) or [] if "extra ==" not in r]
        except m.PackageNotFoundError:
            pass
strangers = {top for top, owners in m.packages_distributions().items()
             if not any(re.sub("[-_.]+", "-", o).lower() in need for o in owners)} - {"linic"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in strangers else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(f) for f in sys.meta_path]
'''


def rehearse(args: Any) -> None:
    """the commands of a lease, at home on the CPU, small"""
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="lease-") as folder:
        _Rehearsal(Path(folder), args).run()
    print(f"rehearsal: all well, {time.time() - began:.0f} s", flush=True)


class _Rehearsal:
    def __init__(self, folder: Path, args: Any):
        self.folder, self.args, self.deadline = folder, args, time.time() + args.limit
        self.tree, self.work, self.out = folder / "checkout", folder / "work", folder / "out"
        (folder / "blocker").mkdir()
        (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
        keep = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self.environment = {**keep, "PYTHONPATH": str(folder / "blocker")}

    def run(self) -> None:
        self.copy_tree()
        self.expect("strangers are blocked", subprocess.run(
            [sys.executable, "-c", "import constriction"], env=self.environment, capture_output=True).returncode != 0)
        first, later = self.shards()
        (self.folder / "site").mkdir()
        with zipfile.ZipFile(self.folder / "site" / "a-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("a_wheel_that_travels.py", "")
        self.lease("start", "--recipe", self.recipe(), "--data", first, "--valid", self.folder / "valid",
                   "--site", self.folder / "site", "--work", self.work, "--device", "cpu", "--budget", 3000,
                   *self.networks_and_init())
        self.expect("a carried wheel can be imported", subprocess.run(
            [sys.executable, "-c", "import a_wheel_that_travels"], env={**os.environ, **_environment(self.work)}
        ).returncode == 0)
        try:
            status, run = self.work / "run" / "status.json", self.work / "run"
            self.wait("steps and weights", lambda: (run / "ema.safetensors").exists()
                      and json.loads(status.read_text())["step"] >= 3)
            self.lease("add", "--data-from", later, "--work", self.work)
            self.wait("the later shard", lambda: "further shards" in (self.work / "log").read_text())
            self.lease("poll", "--work", self.work, "--out", self.out / "a", "--weights", "trunk")
            self.expect("parts on the way", len(list((self.out / "a").glob("*.part"))) > 0)
            self.lease("end", "--work", self.work, "--in", 6)
            self.wait("the end", lambda: not _alive(self.work))
        finally:
            if _alive(self.work):
                os.killpg(int((self.work / "pid").read_text()), signal.SIGKILL)
                print((self.work / "log").read_text()[-3000:])
        self.lease("poll", "--work", self.work, "--out", self.out / "b", "--weights", "ema")
        now = json.loads(status.read_text())
        self.expect("the run is done", now["state"] == "done" and now["progress"] == 1 and now["skipped"] == 0)
        if now["recipe"]["schedule"]["shape"] == "linear":
            self.expect("a trunk from before the decay", (run / "trunk.safetensors").exists())
        self.lease("join", self.out / "b", "-o", self.out / "joined.safetensors")
        self.same_bits(run / "ema.safetensors", self.out / "joined.safetensors")
        came = [p.stat().st_size for p in (self.out / "b").iterdir()]
        self.expect("what comes back fits", len(came) <= 8 and max(came) <= 16 << 20 and sum(came) <= 64 << 20)

    def copy_tree(self) -> None:
        found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
        names = [n for n in found.stdout.decode().split("\0") if n]
        if found.returncode or not names:
            names = [str(p.relative_to(ROOT)) for t in TRAVELS for p in (ROOT / t).rglob("*") if p.is_file()]
        size = 0
        for name in names:
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.tree / name)
                size += (ROOT / name).stat().st_size
        for carried in self.args.carry:
            together = size + sum(p.stat().st_size for p in carried.rglob("*") if p.is_file())
            self.expect(f"tree and {carried}: {together / (1 << 20):.1f} MiB of {LIMIT_MIB}",
                        together < LIMIT_MIB << 20)

    def recipe(self) -> Path:
        """The recipe with small crops and short intervals."""
        table = tomllib.loads(self.args.recipe.read_text(encoding="utf-8"))
        looked = any(p.get("perceptual") for p in table["phases"])
        table["phases"] = [{"start": 0.0, "crop": 64, "batch": 2},
                           {"start": 0.85, "crop": 128, "batch": 1, "perceptual": looked}]
        if "codes" in table:
            table["phases"][0]["stage"] = "codes"
            table["codes"] |= {"squeeze": 32, "vgg": 16, "axes": 8, "examples": 2}
        table["intervals"] = {"log_seconds": 1, "save_seconds": 2, "evaluate_seconds": 4}
        table["evaluation"] |= {"pictures": 1, "qualities": [50.0]}
        path = self.folder / "small.toml"
        path.write_text("".join(f"{k} = {_toml(v)}\n" for k, v in table.items()))
        return path

    def networks_and_init(self) -> list[Any]:
        """What a recipe of MRT needs beside pictures."""
        table, more = tomllib.loads(self.args.recipe.read_text(encoding="utf-8")), list[Any]()
        if "critic" in table:
            from linic.models import build
            from linic.train import checkpoint

            init, preset = self.folder / "trained.safetensors", table["model"]["preset"]
            checkpoint.save(init, build(preset).state_dict(), {"preset": preset, "step": 0})
            more += ["--init", init]
        return more + (["--measures", self.args.measures.resolve()] if self.args.measures else [])

    def shards(self) -> tuple[Path, Path]:
        """Two folders with a shard each: of the pictures given, or made up."""
        import io
        import tarfile

        import numpy as np
        from PIL import Image, features

        folders = [self.folder / name for name in ("first", "later", "valid")]
        for folder in folders:
            folder.mkdir()
        rng, kind = np.random.default_rng(0), "avif" if features.check("avif") else "png"

        def made_up(side: int) -> bytes:
            f, noise = io.BytesIO(), rng.integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(f, kind)
            return f.getvalue()

        given = sorted(p for p in self.args.data.rglob("*") if p.suffix.lower() in PICTURES) if self.args.data else []
        items = [(p.name, p.read_bytes()) for p in given] or [(f"{i}.{kind}", made_up(256)) for i in range(8)]
        for folder, some in ((folders[0], items[::2]), (folders[1], items[1::2])):
            with tarfile.open(folder / f"{folder.name}.tar", "w") as tar:
                for name, content in some:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        (folders[2] / f"judge.{kind}").write_bytes(made_up(128))
        return folders[0], folders[1]

    def lease(self, *command: Any) -> None:
        print(f"$ lease.py {' '.join(map(str, command))}", flush=True)
        script = [sys.executable, self.tree / "scripts" / "lease.py"]
        if subprocess.run([*map(str, [*script, *command])], env=self.environment, cwd=self.tree).returncode:
            raise Refused(f"rehearsal: {command[0]} failed")

    def wait(self, what: str, ready: Callable[[], bool]) -> None:
        while not ready():
            dead = what != "the end" and not _alive(self.work)
            if dead or time.time() > self.deadline:
                print((self.work / "log").read_text()[-3000:])
                raise Refused(f"rehearsal: {what} did not come{': the run is dead' if dead else ''}")
            time.sleep(0.3)
        print(f"  {what}: yes", flush=True)

    def expect(self, what: str, true: bool) -> None:
        if not true:
            raise Refused(f"rehearsal: not so: {what}")
        print(f"  {what}: yes", flush=True)

    def same_bits(self, original: Path, joined: Path) -> None:
        import torch

        from linic.train import checkpoint

        (a, about_a), (b, about_b) = checkpoint.load(original), checkpoint.load(joined)
        self.expect("joined parts are the weights in bf16, bit for bit", about_a == about_b and a.keys() == b.keys()
                    and all(torch.equal(a[k].bfloat16().float() if a[k].dtype == torch.float32 else a[k], b[k])
                            for k in a))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


if __name__ == "__main__":
    sys.exit(main())
