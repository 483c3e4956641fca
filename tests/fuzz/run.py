"""Fuzzing at length: `python tests/fuzz/run.py --executions 100000 --seed 1 [--weights .1] [--torch] [--whole]`.

Execution i of a seed is the same on every run; it draws its model from the golden ones of both families. A worker
process with bounded memory runs them; each may take two seconds of its CPU time. What crashes it, hangs, or raises
anything but a LinicError is written to corpus/, where test_fuzz.py tries it again for ever. Prints how many executions
there were and what became of them.
"""
import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS, BYTES = 2.0, 1 << 30
HERE = Path(__file__).parent
sys.path.append(str(HERE))


def made(seed: int, i: int, share: float) -> tuple[str, Any, bytes, bytes | None]:
    """Execution i: its kind, its golden model, its file, the latents of a file that is right."""
    import harness
    rng = random.Random(f"{seed}:{i}")
    golden = rng.choice(harness.GOLDEN)
    if rng.random() < share:
        return "safetensors", golden, harness.weight_file(rng, golden), None
    return "linic", golden, *harness.picture(rng, golden)


def once(kind: str, golden: Any, data: bytes, latents: bytes | None, path: Path, i: int,
         options: argparse.Namespace) -> str:
    import harness
    if kind == "linic":
        return harness.check_picture(data, golden, latents)
    path.write_bytes(data)
    backends: Any = ()
    if options.torch:
        from linic.entropy.fast import Torch
        backends = (Torch,)
    return "weights: " + harness.check_weights(path, i, backends, options.whole)


class TooLong(BaseException):
    pass


def too_long(*_: Any) -> None:
    raise TooLong(f"more than {SECONDS} s")


def worker(options: argparse.Namespace) -> None:
    import harness  # noqa: F401  (the golden models are no memory of any execution)
    if options.torch or options.whole:
        import torch
        torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, too_long)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES,) * 2)
    seen: Counter[str] = Counter()
    slowest, crashes = 0.0, []
    with tempfile.NamedTemporaryFile(suffix=".safetensors", dir=options.folder) as file:
        for i in range(options.start, options.executions):
            (Path(options.folder) / "at").write_text(str(i))
            file_made = made(options.seed, i, options.weights)
            start = time.process_time()
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                seen[once(*file_made, Path(file.name), i, options)] += 1
            except (Exception, TooLong) as error:
                signal.setitimer(signal.ITIMER_PROF, 0)
                seen[f"CRASH {type(error).__name__}"] += 1
                crashes.append([i, f"{type(error).__name__}: {error}"[:300]])
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - start)
    print(json.dumps({"seen": seen, "slowest": slowest, "crashes": crashes,
                      "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}))


def keep(seed: int, i: int, share: float, why: str) -> None:
    kind, _, data, _ = made(seed, i, share)
    (HERE / "corpus").mkdir(exist_ok=True)
    path = HERE / "corpus" / f"{seed}-{i}.{kind}"
    path.write_bytes(data)
    print(f"CRASH {path.name}: {why}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--weights", type=float, default=0.1, help="share of weight files among them")
    parser.add_argument("--torch", action="store_true", help="accepted programs on torch as well")
    parser.add_argument("--whole", action="store_true", help="weight files also as a whole, with their floats")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        worker(options)
        return 0
    seen: Counter[str] = Counter()
    began, start, slowest, peak = time.monotonic(), options.start, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        while start < options.executions:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--start", str(start)],
                                  stdout=subprocess.PIPE, text=True)
            if done.returncode:
                i = int((Path(folder) / "at").read_text())
                seen["CRASH of the process"] += 1
                keep(options.seed, i, options.weights, f"the process ended with {done.returncode}")
                start = i + 1       # what it had counted until there is lost
                continue
            told = json.loads(done.stdout)
            seen.update(told["seen"])
            slowest, peak = max(slowest, told["slowest"]), max(peak, told["peak"])
            for i, why in told["crashes"]:
                keep(options.seed, i, options.weights, why)
            break
    seconds = time.monotonic() - began
    print(f"{sum(seen.values())} executions in {seconds:.0f} s, the slowest {slowest:.2f} s of CPU time, "
          f"peak memory {peak} MiB")
    for name, count in seen.most_common():
        print(f"{count:9d}  {name}")
    return int(any(name.startswith("CRASH") for name in seen))


if __name__ == "__main__":
    sys.exit(main())
