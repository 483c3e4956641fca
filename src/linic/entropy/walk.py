"""Encoder and decoder are one walk over a plan of steps; only the coder differs.

A plan is a generator made by a model: it yields a `Step`, gets the step's symbols back, and returns the latents.
In the encoder every step knows the symbols that it wants coded; in the decoder they come from the file. What the
plan does with the symbols is the same code in both, so the two sides cannot drift apart.
"""

from collections.abc import Generator
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

Latents = TypeVar("Latents")


class Step(NamedTuple):
    """Symbols that are independent given all earlier ones. `table`: int32 (N,), the frequency table of each;
    `wanted`: int32 (N,) in the encoder, None in the decoder."""

    table: np.ndarray
    wanted: np.ndarray | None


class Coder(Protocol):
    """rangecoder.Encoder (writes the symbols and returns them) or rangecoder.Decoder (ignores None, reads them)."""

    def code(self, index: np.ndarray, symbols: np.ndarray | None) -> np.ndarray: ...


def walk(plan: Generator[Step, np.ndarray, Latents], coder: Coder) -> Latents:
    """Send or receive every latent, step by step."""
    step = next(plan)
    while True:
        symbols = coder.code(step.table, step.wanted)
        try:
            step = plan.send(symbols)
        except StopIteration as end:
            return end.value
