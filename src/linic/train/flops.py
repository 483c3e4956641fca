"""How much of a device's arithmetic a run uses: operations of a crop, counted once, over time and peak.

Counted are products, convolutions and the two operators of kernels/, forward and backward: what the mathematics needs,
whichever kernel does it. Elementwise passes count nothing, though they take time: a small share is no shame.
"""

import copy
import math
import time
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from linic.train.loss import rate_distortion
from linic.train.recipe import Loss

# Dense bf16, 10^12 a second, by a part of the device's name. Source: NVIDIA's data sheets.
PEAKS = {"H200 NVL": 835.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0}
SIDE = 1024


def of_pixel(model: nn.Module, size: int, loss: Loss) -> float:
    """Forward and backward, from a crop of `size` pixels a side: they grow with its area. NaN for a model that cannot
    run without data."""
    try:
        shadow = copy.deepcopy(model).to("meta").train()        # shapes only: nothing is computed
        x, quality = torch.empty(1, 3, size, size, device="meta"), torch.full((1,), 50.0, device="meta")
        with FlopCounterMode(display=False) as counter, torch.random.fork_rng([]):     # a model draws, even so
            rate_distortion(shadow(x, quality), x, quality, loss).loss.mean().backward()
        return counter.get_total_flops() / size**2
    except Exception:               # whatever: a run does not end for want of this number
        return math.nan


def peak(device: str) -> float:
    """Operations a second of all its units at their best: of a GPU by its name (NaN: unknown), of a CPU as a product
    in float32 or bf16 reaches it, with the threads that torch has now."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        return next((1e12 * value for part, value in PEAKS.items() if part in name), math.nan)
    return _cpu_peak(torch.get_num_threads())


@cache
def _cpu_peak(threads: int) -> float:
    best = math.inf
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(SIDE, SIDE, dtype=dtype)
        for _ in range(2):                  # the first wakes the threads
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best
