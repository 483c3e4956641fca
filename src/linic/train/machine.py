"""What a run needs of the machine it stands on: intervals, cores, signals, torch's global switches."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch


class Every:
    """True once per interval."""

    def __init__(self, seconds: float, now: float):
        self.seconds, self.last = seconds, now

    def __call__(self, now: float) -> bool:
        due = now - self.last >= self.seconds
        self.last = now if due else self.last
        return due


class Neighbours:
    """Leaves cores to other processes. A loop on all cores waits for the slowest at thousands of barriers a step:
    beside one busy stranger two threads ran at a quarter of their speed, one thread keeps its core. (Linux.)"""

    def __init__(self, threads: int):
        self.most = self.threads = threads
        self.last = self._sample()

    @staticmethod
    def useful(threads: int) -> bool:
        return threads > 1 and threads == os.cpu_count() and Path("/proc/stat").exists()

    def _sample(self) -> tuple[float, float, float]:
        """Seconds: on the clock, used by all processes, used by this one."""
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq, stolen = map(int, f.readline().split()[1:9])
        used = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
        return time.time(), used, time.process_time()

    def look(self) -> int:
        """Threads to use from now on; fewer come easily back only when the others have really gone."""
        (t0, all0, own0), (t1, all1, own1) = self.last, self._sample()
        self.last = t1, all1, own1
        busy = (all1 - all0 - (own1 - own0)) / max(t1 - t0, 1e-3)
        taken = math.ceil(busy - (0.4 if self.threads == self.most else 0.2))
        self.threads = max(1, self.most - max(0, taken))
        return self.threads


class Stop:
    """Set by the first SIGTERM or SIGINT; a second one acts as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        except ValueError:              # not the main thread: the caller keeps its signals
            self._before = {}
        try:
            yield
        finally:
            self._restore()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside, once the time is over: a compiler that hangs may not hold up a run. In another thread than
    the main one there is no limit."""
    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"abandoned after {seconds:.0f} s")

    try:
        before = signal.signal(signal.SIGALRM, over)
    except (ValueError, AttributeError):        # not the main thread; not Unix
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def keep_memory() -> None:
    """Asks glibc to keep what is freed. A step frees and takes the same gigabyte again; given back in between, it comes
    as pages to be zeroed, 5 to 10 % of a step. Nothing where the C library is another."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3        # malloc.h
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(mmap_threshold, 1 << 30)
    mallopt(top_pad, 64 << 20)


@contextmanager
def settings(device: str, threads: int, seed: int) -> Iterator[None]:
    """Global switches of torch, put back afterwards."""
    threads_before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    keep_memory()
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")      # TF32, in training only: the codec never sees it
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(precision)
