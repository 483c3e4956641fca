"""The stream of the range coder, in plain Python: the definition, and the coder where constriction has no wheel.

Tables (frequencies of sum 2^24) and integers -> bytes, and back. The words are in docs/format.md, section 6.
State: `lower` and `range`, 64 bits each; 32-bit words leave at the top; a carry runs back through those written.
Raises Damaged. Checks of the caller's arrays are in __init__.py; the fast twin is fast.py, byte for byte the same.
"""
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

from linic.errors import Damaged
from linic.rangecoder.tables import LIMIT, PRECISION, Tables

WORD = 32
MASK = (1 << 64) - 1
HALF = 1 << (PRECISION - 1)
MAX_PREFIX_BITS = 15


class Encoder:
    def __init__(self, tables: Tables):
        self._tables = tables
        self._words: list[int] = []
        self._lower, self._range = 0, MASK

    def code(self, index: Sequence[int], symbols: Sequence[int]) -> list[int]:
        escaped = []
        for i in step_order(index):
            low, cumulative = self._tables.row(index[i])
            entry, escape = symbols[i] - low, len(cumulative) - 2
            if not 0 <= entry < escape:
                escaped.append((low, low + escape - 1, symbols[i]))
                entry = escape
            self._put(cumulative[entry], cumulative[entry + 1] - cumulative[entry])
        for low, high, symbol in escaped:
            for bit in escape_bits(low, high, symbol):
                self._put(bit * HALF, HALF)
        return list(symbols)

    def bits(self) -> float:
        return WORD * len(self._words) + 64 - math.log2(self._range)

    def _put(self, left: int, frequency: int) -> None:
        scale = self._range >> PRECISION
        self._lower += scale * left
        self._range = scale * frequency
        if self._lower > MASK:
            self._carry()
        if self._range < 1 << WORD:
            self._words.append(self._lower >> WORD)
            self._lower = self._lower << WORD & MASK
            self._range <<= WORD

    def _carry(self) -> None:
        self._lower &= MASK
        i = len(self._words) - 1
        while self._words[i] == (1 << WORD) - 1:
            self._words[i] = 0
            i -= 1
        self._words[i] += 1

    def finish(self) -> bytes:
        written = b"".join(word.to_bytes(4, "big") for word in self._words)
        return shortest(int.from_bytes(written, "big") << 64 | self._lower, self._range, len(self._words) + 2)


class Decoder:
    def __init__(self, tables: Tables, data: bytes):
        self._tables, self._data = tables, data
        self._at = 0                       # words taken, beyond the two under view
        self._range = MASK
        self._ahead = int.from_bytes(data[:8].ljust(8, b"\0"), "big")     # the stream's number less `lower`

    def code(self, index: Sequence[int], symbols: object = None) -> list[int]:
        found, escaped = [0] * len(index), []
        for i in step_order(index):
            low, cumulative = self._tables.row(index[i])
            entry, escape = self._get(cumulative), len(cumulative) - 2
            found[i] = low + entry
            if entry == escape:
                escaped.append((i, low, low + escape - 1))
        for i, low, high in escaped:
            found[i] = read_escape(low, high, lambda: self._get([0, HALF, 2 * HALF]), self._offset())
        return found

    def _get(self, cumulative: list[int]) -> int:
        scale = self._range >> PRECISION
        share = self._ahead // scale
        if share >= 1 << PRECISION:
            raise Damaged(self._offset(), IMPOSSIBLE)
        entry = bisect_right(cumulative, share) - 1
        self._ahead -= scale * cumulative[entry]
        self._range = scale * (cumulative[entry + 1] - cumulative[entry])
        if self._range < 1 << WORD:
            start = 4 * (self._at + 2)
            word = self._data[start:start + 4].ljust(4, b"\0")             # zeros follow the last byte
            self._ahead = self._ahead << WORD | int.from_bytes(word, "big")
            self._range <<= WORD
            self._at += 1
        return entry

    def _offset(self) -> int:
        return min(4 * self._at, len(self._data))

    def finish(self) -> None:
        words = self._at + 2
        number = int.from_bytes(self._data[:4 * words].ljust(4 * words, b"\0"), "big")
        check_end(self._data, shortest(number - self._ahead, self._range, words))


IMPOSSIBLE = "no symbol has this code: the stream is damaged, fetch the file again"


def step_order(index: Sequence[int]) -> list[int]:
    """Positions by table, ascending; inside a table in the given order (sorted() is stable)."""
    return sorted(range(len(index)), key=index.__getitem__)


def escape_bits(low: int, high: int, symbol: int) -> list[int]:
    """Distance beyond low..high in Exp-Golomb code of order 0, then 1 if the symbol is below."""
    below = symbol < low
    number = 1 + (low - 1 - symbol if below else symbol - high - 1)
    digits = [int(c) for c in f"{number:b}"]
    return [0] * (len(digits) - 1) + digits + [int(below)]


def read_escape(low: int, high: int, bit: Callable[[], int], offset: int) -> int:
    zeros = 0
    while not bit():
        zeros += 1
        if zeros > MAX_PREFIX_BITS:
            raise Damaged(offset, f"an escape of more than {MAX_PREFIX_BITS} prefix bits: fetch the file again")
    number = 1
    for _ in range(zeros):
        number = number << 1 | bit()
    symbol = low - number if bit() else high + number
    if abs(symbol) > LIMIT:
        raise Damaged(offset, f"an escape says {symbol}, the limit is {LIMIT}: fetch the file again")
    return symbol


def shortest(lower: int, size: int, words: int) -> bytes:
    """The shortest bytes that, extended by zeros to `words` words, lie in [lower, lower + size).

    size < 2^64, so at most one multiple of 2^64 is inside: dropping its zeros finds everything shorter.
    """
    for dropped in range(64, -1, -8):
        number = -(-lower >> dropped) << dropped
        if number < lower + size:
            break
    return number.to_bytes(4 * words, "big").rstrip(b"\0")


def check_end(data: bytes, canonical: bytes) -> None:
    """Symbols have one stream only. Anything else is damage, also when it decodes."""
    if data != canonical:
        at = next((i for i, (a, b) in enumerate(zip(data, canonical)) if a != b), min(len(data), len(canonical)))
        raise Damaged(at, f"the stream has {len(data)} bytes and its symbols need {len(canonical)}, or it differs "
                          "from theirs: damaged, fetch the file again")
