"""The processes of one run, one a device, as torchrun starts them. Alone, all of this does nothing.

    torchrun --nproc-per-node 2 -m linic.train RECIPE ...

Each process draws its own share of every batch; gradients are averaged before they are clipped, so all take the same
step. The first alone decides (time, end file), writes, evaluates and prints. gloo on CPUs, nccl between GPUs; what is
decided travels by gloo always, so that nothing waits for a GPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(days=1)            # the others wait while the first decodes or evaluates


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """In place, over all processes: one message."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(mean.view_as(tensor))

    def told(self, value: Any) -> Any:
        """The first process's value."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def any(self, value: bool) -> bool:
        """Whether it is true anywhere."""
        if self.count == 1:
            return value
        flag = torch.tensor([value], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def time_and_stop(self, now: float, stop: bool) -> tuple[float, bool]:
        """The first one's clock, anybody's wish to stop: one message, before every step."""
        if self.count == 1:
            return now, stop
        both = torch.tensor([now if self.first else float("-inf"), float(stop)], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return float(both[0]), bool(both[1])

    def same(self, tensors: Sequence[Tensor]) -> None:
        """In place: the first one's."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """What it leaves on disk the others find."""
        if not self.first:
            self.any(False)
        yield
        if self.first:
            self.any(False)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Lines on stderr are the first one's."""
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield


def here() -> tuple[int, int]:
    """Number of this process among those of its machine, and how many there are in all."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """`device`: that of this process. Who has joined already stays so: a second group of one torchrun may connect to
    what is left of the first."""
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if here()[1] == 1:
        yield Ranks()
        return
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
