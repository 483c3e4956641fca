"""How integer matrix products are carried: any way whose sums are exact is allowed, the result is the same.

    native  int32 by compiled multiply-adds of 16-bit pairs, requantised at once; every other operator is compiled then
            as well (native.py); sums beyond int32 are f64's; CPU only
    int8    7-bit digits of x times 7-bit digits of w, by torch._int_mm (u8 x s8): |digit| <= 127 cannot saturate
    f32     the same digits by float32 products, in runs of at most 1,032 channels: sums stay below 2^24
    f64     one float64 product: sums stay below 2^53, which every program is checked for
    i64     int64: the definition; not on a GPU

Which one runs is decided when a program is loaded: the first of PREFERRED that passes `self_test` on this machine, or
the one that LINIC_CARRIER names. Float sums of integers below the stated limits are exact in every order, so threads,
instruction sets, fused multiply-adds and libraries cannot change them. Source of the digits and limits: our own
measurements (docs/determinism.md).
"""

import os
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from linic.entropy import native
from linic.errors import BackendMissing, UsageError

Product = Callable[[Tensor], Tensor]        # (R, K) int32 -> (R, N): float64, or int64 from i64 and native
RUN = 1032                                  # 127 * 127 * 1032 < 2^24
# int8 and f32 take one product a digit pair: two for 8-bit weights, four for 14-bit ones.
PREFERRED = {("cpu", 8): ("native", "int8", "f64", "i64"), ("cpu", 14): ("native", "f64", "i64"),
             ("cuda", 8): ("int8", "f64", "f32"), ("cuda", 14): ("f64", "f32")}
CARRIERS = ("native", "int8", "f32", "f64", "i64")


def _i64(weight: Tensor) -> Product:
    w = weight.long().t().contiguous()
    return lambda x: x.long() @ w


def _f64(weight: Tensor) -> Product:
    w = weight.double().t().contiguous()
    return lambda x: x.double() @ w


def _digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x + 8192 = 128 high + low, for -8192 <= x <= 8191; both 0..127, uint8."""
    u = x + 8192
    return (u >> 7).to(torch.uint8), (u & 127).to(torch.uint8)


def _weight_digits(weight: Tensor) -> list[Tensor]:
    """Digits of place value 128 and 1, |digit| <= 127; only the latter where the weights are that small."""
    w = weight.int()
    if int(w.abs().max()) <= 127:
        return [w.to(torch.int8)]
    return [(w >> 7).to(torch.int8), (w & 127).to(torch.int8)]


def _by_digits(weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], ready: Callable[[Tensor], Tensor],
               pad: bool) -> Product:
    n, k = weight.shape
    digits = _weight_digits(weight)
    parts = [ready(w) for w in digits]
    offset = 8192 * weight.double().sum(1)
    narrow = max(int(w.long().abs().sum(1).max()) for w in digits) <= 131071

    def run(x: Tensor) -> Tensor:
        rows, total = x.shape[0], None
        high, low = _digits(x)
        if pad:
            size = (0, -k % 8, 0, max(32 - rows, 0))
            high, low = (torch.nn.functional.pad(d, size) for d in (high, low))
        for w in parts:
            # sum |digit of w| <= 131,071 keeps 128 high + low within int32; float32 sums go over to float64 at once.
            sums, small = product(high, w), product(low, w)
            both = sums.mul_(128).add_(small) if narrow and sums.dtype == torch.int32 else sums.double() * 128 + small
            both = both[:rows, :n].double()
            total = both if total is None else total.mul_(128).add_(both)
        assert total is not None
        return total - offset

    return run


def _int8(weight: Tensor) -> Product:
    n, k = weight.shape

    def ready(w: Tensor) -> Tensor:
        return torch.nn.functional.pad(w, (0, -k % 8, 0, -n % 8)).t()      # column-major, as _int_mm likes it

    kind = torch.int8 if weight.device.type == "cuda" else torch.uint8     # a digit is the same byte in both
    return _by_digits(weight, lambda d, w: torch._int_mm(d.view(kind), w), ready, pad=True)


def _f32(weight: Tensor) -> Product:
    def product(digit: Tensor, w: Tensor) -> Tensor:
        sums = [digit[:, i:i + RUN].float() @ w[i:i + RUN] for i in range(0, len(w), RUN)]
        return sums[0] if len(sums) == 1 else torch.stack(sums).double().sum(0)

    return _by_digits(weight, product, lambda w: w.t().float().contiguous(), pad=False)


_MAKERS: dict[str, Callable[[Tensor], Product]] = {"native": native.product, "int8": _int8, "f32": _f32, "f64": _f64,
                                                  "i64": _i64}


def carry(name: str, weight: Tensor) -> Product:
    """weight (N, K), on its device."""
    return _MAKERS[name](weight)


def _lcg(count: int, modulus: int, seed: int) -> Tensor:
    """Pseudo-random integers 0..modulus-1, the same everywhere."""
    out, state = [], seed
    for _ in range(count):
        state = (1103515245 * state + 12345) & 0x7FFFFFFF
        out.append((state >> 8) % modulus)
    return torch.tensor(out)


@cache
def self_test(name: str, device: str, bits: int, shapes: tuple[tuple[int, int], ...]) -> str:
    """"" when the carrier gives int64's sums on worst cases of these (N, K), else what went wrong."""
    top, noise = 2 ** (bits - 1) - 1, _lcg(4096, 1 << 14, 1)
    if name == "native" and (problem := "it runs on cpu" if device != "cpu" else native.self_test()):
        return problem
    try:
        for n, k in shapes:
            if name == "native":
                top = min(2 ** (bits - 1) - 1, 262143 // k)     # sums of int32, as far as they go
            x = noise.repeat(-(-17 * k // 4096))[: 17 * k].view(17, k) - 8192
            x[0], x[1], x[2] = 8191, -8192, torch.where(torch.arange(k) % 2 == 0, 8191, -8192)
            w = (noise.flip(0).repeat(-(-n * k // 4096))[: n * k].view(n, k) % (2 * top + 1)) - top
            w[0] = top
            w[-1] = -top
            wanted = (x @ w.t()).double()
            product = carry(name, w.to(device))
            for rows in (1, 17):
                got = product(x[:rows].int().to(device)).double().cpu()
                if not torch.equal(got, wanted[:rows]):
                    return f"wrong sums for weights {n}x{k}"
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0][:200]
    return ""


def asked() -> str | None:
    name = os.environ.get("LINIC_CARRIER") or None
    if name not in (None, *CARRIERS):
        raise UsageError(f"LINIC_CARRIER is {name!r}; {', '.join(CARRIERS)} are possible")
    return name


def choose(device: str, bits: int, shapes: Iterable[tuple[int, int]], wanted: str | None = None) -> tuple[str, str]:
    """-> carrier and why. Raises BackendMissing when none is exact here."""
    known = tuple(sorted(set(shapes)))
    reasons: list[str] = []
    wanted = wanted or asked()
    for name in [wanted] if wanted else PREFERRED.get((device, bits), ("f64", "i64")):
        problem = self_test(name, device, bits, known)
        if not problem:
            return name, "asked for" if wanted else "; ".join([*reasons, f"{name} passed its self-test"])
        reasons.append(f"{name}: {problem}")
    raise BackendMissing(f"no exact integer arithmetic on {device}: {'; '.join(reasons)}. Use another device")
