"""The stream of reference.py by constriction: one vectorised call a table and step, same bytes.

What is constriction's own and not in its manual, found by experiment with 0.5.0 and held by tests:
Categorical(F - 1, perfect=False) of float64 integers has exactly the frequencies F (it adds 1 to each);
pos() is (words that have left, (lower mod 2^64, range)); zeros are read past the end, silently;
data that no encoder wrote raises a bare AssertionError.
"""
import math
from itertools import pairwise
from typing import Any

import constriction
import numpy as np

from linic.errors import Damaged
from linic.rangecoder.reference import HALF, IMPOSSIBLE, check_end, escape_bits, read_escape, shortest
from linic.rangecoder.tables import IntArray, Tables

BIT = constriction.stream.model.Categorical(np.full(2, HALF - 1.0), perfect=False)


def model_of(tables: Tables, table: int) -> Any:
    if table not in tables.models:
        frequencies = tables.frequencies(table).astype(np.float64)
        tables.models[table] = constriction.stream.model.Categorical(frequencies - 1, perfect=False)
    return tables.models[table]


def groups(index: IntArray) -> tuple[IntArray, list[tuple[int, int, int]]]:
    """The step's order, and (table, start, end) of each group in it."""
    # NumPy sorts 16-bit integers by radix: 10x faster.
    order = np.argsort(index.astype(np.uint16) if index.size and index.max() < 1 << 16 else index, kind="stable")
    ordered = index[order]
    cuts = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(index)] if index.size else []
    return order, [(int(ordered[a]), a, b) for a, b in pairwise(cuts)]


class Encoder:
    def __init__(self, tables: Tables):
        self._tables = tables
        self._coder = constriction.stream.queue.RangeEncoder()

    def code(self, index: IntArray, symbols: IntArray) -> IntArray:
        order, parts = groups(index)
        low, escape = self._tables.lows[index[order]], self._tables.lengths[index[order]] - 1
        entries = symbols[order] - low
        outside = (entries < 0) | (entries >= escape)
        entries[outside] = escape[outside]
        for table, start, end in parts:
            self.put(entries[start:end], table)
        for i in np.flatnonzero(outside).tolist():
            self.put_bits(escape_bits(int(low[i]), int(low[i] + escape[i]) - 1, int(symbols[order[i]])))
        return symbols

    def put(self, entries: IntArray, table: int) -> None:
        self._coder.encode(entries, model_of(self._tables, table))

    def put_bits(self, bits: list[int]) -> None:
        self._coder.encode(np.array(bits, np.int32), BIT)

    def position(self) -> int:
        return int(self._coder.pos()[0])

    def bits(self) -> float:
        position, (_, size) = self._coder.pos()
        return 32 * position + 64 - math.log2(size)

    def finish(self) -> bytes:
        position, (lower, size) = self._coder.pos()
        words = position + 2
        sealed = self._coder.get_compressed().astype(">u4").tobytes().ljust(4 * words, b"\0")
        inside = int.from_bytes(sealed, "big")                  # somewhere in [L, L + size)
        return shortest(inside - (inside - lower) % (1 << 64), size, words)


class Decoder:
    """A twin encodes what is decoded (a tenth of the time): at the end it says which bytes there should have been."""

    def __init__(self, tables: Tables, data: bytes):
        self._tables, self._data, self._twin = tables, data, Encoder(tables)
        words = np.frombuffer(data + bytes(-len(data) % 4), ">u4").astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def code(self, index: IntArray, symbols: object = None) -> IntArray:
        order, parts = groups(index)
        entries = np.empty(len(index), np.int32)
        for table, start, end in parts:
            entries[start:end] = self._get(table, end - start)
        low, escape = self._tables.lows[index[order]], self._tables.lengths[index[order]] - 1
        found = entries + low
        for i in np.flatnonzero(entries == escape).tolist():
            found[i] = self._get_escape(int(low[i]), int(low[i] + escape[i]) - 1)
        result = np.empty_like(found)
        result[order] = found
        return result

    def _get(self, table: int, count: int) -> IntArray:
        try:
            entries = self._coder.decode(model_of(self._tables, table), count)
        except (AssertionError, ValueError):
            raise Damaged(self._offset(), IMPOSSIBLE) from None
        self._twin.put(entries, table)
        return entries

    def _get_escape(self, low: int, high: int) -> int:
        symbol = read_escape(low, high, self._bit, self._offset())
        self._twin.put_bits(escape_bits(low, high, symbol))
        return symbol

    def _bit(self) -> int:
        try:
            return int(self._coder.decode(BIT))
        except (AssertionError, ValueError):
            raise Damaged(self._offset(), IMPOSSIBLE) from None

    def _offset(self) -> int:
        return min(4 * self._twin.position(), len(self._data))

    def finish(self) -> None:
        check_end(self._data, self._twin.finish())
