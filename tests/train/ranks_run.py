"""One of two processes of test_ranks.py, started by torchrun: RECIPE PICTURES VALID OUT."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from train_helpers import Clock, Tiny, encoded, picture, write_tar

from linic.train import ranks, recipe, speed
from linic.train.loop import train
from linic.train.recipe import Loss

RANK = int(os.environ["RANK"])


def steps_of(average, x, quality) -> dict[str, torch.Tensor]:
    """Weights after three steps without noise."""
    model = Tiny().eval()
    step = speed.Step(model, torch.optim.AdamW(model.parameters(), 1e-2, fused=True), 2.0, Loss(0.35))
    step.average = average
    for _ in range(3):
        numbers = step(x, quality, 1e-2)
    return {**{k: v.clone() for k, v in model.state_dict().items()}, "numbers": numbers}


def main(recipe_file: str, pictures: str, valid: str, out: Path) -> None:
    torch.manual_seed(1)
    x, quality = torch.rand(4, 3, 64, 64), torch.tensor([10.0, 40.0, 60.0, 90.0])
    ours = steps_of(us.average, x[us.rank::2], quality[us.rank::2])
    assert us.told(f"rank {us.rank}") == "rank 0" and us.any(us.rank == 1) and not us.any(False)
    save_file(ours, out / f"steps-{RANK}.safetensors")
    if RANK == 0:
        save_file(steps_of(None, x, quality), out / "steps-alone.safetensors")

    def run(name: str, clock: Clock, **more) -> tuple[str, int]:
        model = Tiny()
        with torch.no_grad():
            model.down.bias.add_(RANK)              # the first one's weights are those that count
        result = train(recipe.load(recipe_file), data=pictures, valid=valid, out=out / name, device="cpu", threads=1,
                       cache=out / "cache", model=model, clock=clock, **more)
        save_file(model.state_dict(), out / f"{name}-{RANK}.safetensors")
        return result["state"], result["pictures"]

    def arrives() -> None:
        write_tar(Path(pictures) / "late.tar", {"9.png": encoded(picture(9))})
        os.utime(Path(pictures) / "late.tar", (time.time() - 60,) * 2)

    assert run("whole", Clock({} if RANK else {2: arrives})) == ("done", 5)
    # A signal to the second process stops both; a clock that only it sees changes nothing.
    stop = Clock({4: lambda: os.kill(os.getpid(), signal.SIGTERM)} if RANK else {})
    assert run("cut", stop) == ("stopped", 5)
    assert run("cut", Clock(), resume=True) == ("done", 5)
    assert run("late", Clock(), budget_s=3.0) == ("stopped", 5)


if __name__ == "__main__":
    with ranks.joined("cpu") as us:
        main(*sys.argv[1:4], Path(sys.argv[4]))
