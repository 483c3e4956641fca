"""The range coder's stream: what goes in comes out, both backends write the same bytes, and damage is an error."""
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linic.errors import BackendMissing, Damaged, UsageError
from linic.rangecoder import LIMIT, Decoder, Encoder, Tables, backends_here
from linic.rangecoder.reference import shortest
from linic.rangecoder.tables import TOTAL, gaussian_tables, quantise

BOTH = pytest.mark.parametrize("backend", backends_here())


def encode(tables, steps, backend=None):
    coder = Encoder(tables, backend)
    for index, symbols in steps:
        assert coder.code(index, symbols).tolist() == list(symbols)
    return coder.finish()


def decode(tables, data, indices, backend=None):
    coder = Decoder(tables, data, backend)
    found = [coder.code(index) for index in indices]
    coder.finish()
    assert all(f.dtype == np.int32 for f in found)
    return [f.tolist() for f in found]


def tables_of(rows, lows):
    return Tables(np.array([f for row in rows for f in row], np.uint32), [len(row) for row in rows], lows)


@st.composite
def frequencies(draw):
    """Flat, random or skewed to the limit: skewed rows leave the lower bound near a word's end, which carries."""
    n = draw(st.integers(2, 12))
    if draw(st.booleans()):
        row = [1] * n
        row[draw(st.integers(0, n - 1))] = TOTAL - n + 1
        return row
    return quantise([draw(st.floats(1e-9, 1)) for _ in range(n)])


@st.composite
def messages(draw):
    rows = draw(st.lists(frequencies(), min_size=1, max_size=5))
    lows = [draw(st.integers(-LIMIT, LIMIT - len(row) + 2) | st.integers(-6, 0)) for row in rows]
    steps = []
    for _ in range(draw(st.integers(0, 4))):
        index = draw(st.lists(st.integers(0, len(rows) - 1), max_size=40))
        near = [draw(st.integers(-2, len(rows[i]) + 2)) + lows[i] for i in index]
        far = [draw(st.integers(-LIMIT, LIMIT)) if draw(st.integers(0, 19)) == 0 else s for s in near]
        steps.append((index, [max(-LIMIT, min(LIMIT, s)) for s in far]))
    return tables_of(rows, lows), steps


@settings(max_examples=300, deadline=None)
@given(messages())
def test_what_was_written_is_read_back_and_both_backends_write_the_same_bytes(case):
    tables, steps = case
    streams = {name: encode(tables, steps, name) for name in backends_here()}
    assert len(set(streams.values())) == 1
    for name, data in streams.items():
        assert decode(tables, data, [index for index, _ in steps], name) == [symbols for _, symbols in steps]


@pytest.mark.parametrize("seed", range(20))
def test_long_messages_on_skewed_tables_carry_and_agree(seed):
    """Entries of frequency 1 at the top of the range push the lower bound across word borders."""
    random = np.random.default_rng(seed)
    tables = tables_of([[1, 1, TOTAL - 3, 1], [TOTAL - 2, 1, 1], [1, TOTAL - 1]], [-1, 0, 5])
    index = random.integers(0, 3, 2000)
    symbols = random.integers(-1, 7, 2000)
    streams = {encode(tables, [(index, symbols)], name) for name in backends_here()}
    assert len(streams) == 1
    for name in backends_here():
        assert decode(tables, *streams, [index], name) == [symbols.tolist()]


def test_a_carry_runs_back_through_whole_words():
    """Built by hand: fill two words with ones, then step over their end."""
    from linic.rangecoder.reference import Encoder as Reference

    carries = []

    class Watched(Reference):
        def _carry(self):
            carries.append([f"{word:08x}" for word in self._words])
            super()._carry()

    tables = tables_of([[TOTAL // 2 - 1, 2, TOTAL // 2 - 1]], [-1])
    random = np.random.default_rng(2)
    for _ in range(200):
        coder, symbols = Watched(tables), random.choice([0, 0, 0, 1], 40).tolist()
        coder.code([0] * 40, symbols)
        assert coder.finish() == encode(tables, [([0] * 40, symbols)])
    assert any(words[-1] == "ffffffff" for words in carries)


@BOTH
def test_an_empty_message_is_no_bytes(backend):
    tables = tables_of([[TOTAL - 1, 1]], [0])
    assert encode(tables, [], backend) == encode(tables, [([], [])], backend) == b""
    assert decode(tables, b"", [[], []], backend) == [[], []]


@BOTH
@pytest.mark.parametrize("symbol", [-LIMIT, -7, -1, 0, 1, 2, LIMIT])
def test_every_symbol_within_the_limit_has_a_code(backend, symbol):
    tables = tables_of([[TOTAL - 2, 1, 1]], [0])
    assert decode(tables, encode(tables, [([0], [symbol])], backend), [[0]], backend) == [[symbol]]


@BOTH
def test_steps_go_by_table_and_escapes_follow_their_step(backend):
    """The order is the format's: the same symbols, sorted by hand into one step a table, give the same stream."""
    tables = tables_of([quantise([1, 5, 1]), quantise([3, 3, 1])], [-1, 0])
    mixed = encode(tables, [([1, 0, 1, 0], [0, -1, 1, 0])], backend)
    assert mixed == encode(tables, [([0, 0], [-1, 0]), ([1, 1], [0, 1])], backend)
    assert encode(tables, [([1, 0], [9, 0])], backend) != encode(tables, [([1], [9]), ([0], [0])], backend)


def test_golden_bytes_of_a_small_message():
    """The promise of the format. If this fails, old files no longer decode: a new version is due, not a new number."""
    tables = tables_of([[TOTAL - 3, 1, 1, 1], quantise([1, 2, 3, 4, 1]), quantise([1, 1])], [-1, -2, 0])
    steps = [([1, 0, 1, 2, 1], [-2, -1, 1, 0, 0]), ([], []), ([2, 1, 0], [3, -300, LIMIT])]
    for name in backends_here():
        assert encode(tables, steps, name).hex() == GOLDEN
    assert decode(tables, bytes.fromhex(GOLDEN), [i for i, _ in steps]) == [s for _, s in steps]


def test_the_example_of_the_format_page_is_true():
    tables = tables_of([[TOTAL // 2, TOTAL // 4, TOTAL // 8, TOTAL // 8], [TOTAL - 2, 1, 1]], [-1, 0])
    data = encode(tables, [([1, 0, 0], [5, 0, -1]), ([0, 0], [1, -4])])
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    assert f"the payload is `{data.hex(' ').upper()}`" in page


GOLDEN = "102801bcb7dfb79775fd23"


@given(st.integers(0, (1 << 128) - 1), st.integers(0, 128), st.integers(1 << 32, (1 << 64) - 1))
def test_the_end_is_inside_the_interval_and_nothing_shorter_or_smaller_is(lower, zeros, size):
    lower = min(lower >> zeros << zeros, (1 << 128) - size)
    data = shortest(lower, size, 4)
    assert lower <= int.from_bytes(data.ljust(16, b"\0"), "big") < lower + size
    for length in range(len(data) + 1):
        unit = 1 << 8 * (16 - length)
        first = -(-lower // unit) * unit                      # the smallest of this length that is not below
        assert length == len(data) or first >= lower + size
    assert first == int.from_bytes(data.ljust(16, b"\0"), "big")


def test_streams_end_within_a_byte_of_the_information_in_them():
    scales = [0.3, 1.0, 4.0]
    tables, random, excess = gaussian_tables(scales), np.random.default_rng(5), []
    for _ in range(300):
        index = random.integers(0, 3, random.integers(1, 60))
        symbols = np.rint(random.normal(size=len(index)) * np.array(scales)[index] * 0.8).astype(int)
        rows = [(tables.frequencies(i), s - tables.lows[i]) for i, s in zip(index, symbols)]
        if any(not 0 <= e < len(f) - 1 for f, e in rows):
            continue
        ideal_bits = sum(PRECISION_BITS - math.log2(f[e]) for f, e in rows)
        excess.append(len(encode(tables, [(index, symbols)])) - ideal_bits / 8)
    assert len(excess) > 200
    assert 0 < np.mean(excess) < 1 and max(excess) < 2


PRECISION_BITS = 24


def message(backend=None, count=400):
    tables, random = gaussian_tables([0.2, 1.0, 9.0]), np.random.default_rng(1)
    index = random.integers(0, 3, count)
    symbols = np.rint(random.normal(size=count) * np.array([0.2, 1.0, 9.0])[index]).astype(int)
    symbols[7] = 500
    return tables, index, symbols, encode(tables, [(index, symbols)], backend)


@BOTH
def test_a_stream_cut_or_flipped_anywhere_is_never_taken_for_the_same_message(backend):
    """Most are Damaged. Not all: any short string is somebody's message, and integrity is the container's job."""
    tables, index, symbols, data = message(backend, 60)
    flips = [(int.from_bytes(data, "big") ^ 1 << bit).to_bytes(len(data), "big") for bit in range(8 * len(data))]
    refused = 0
    for bad in [data[:end] for end in range(len(data))] + flips:
        try:
            assert decode(tables, bad, [index], backend) != [symbols.tolist()]
        except Damaged as error:
            assert 0 <= error.offset <= len(bad)
            refused += 1
    assert refused > 0.8 * (len(data) + len(flips))


@BOTH
@pytest.mark.parametrize("tail", [b"\0", b"\0" * 9, b"\1", b"\0" * 100_000])
def test_bytes_after_the_end_of_a_stream_are_damaged(backend, tail):
    tables, index, _, data = message(backend, 60)
    with pytest.raises(Damaged):
        decode(tables, data + tail, [index], backend)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 60))
def test_any_bytes_decode_to_the_same_or_are_refused_by_both_backends(data, count):
    tables = gaussian_tables_once()
    index = np.arange(count) % len(tables)
    results = []
    for name in backends_here():
        try:
            results.append(decode(tables, data, [index, index], name))
        except Damaged as error:
            assert 0 <= error.offset <= len(data)
            results.append("damaged")
    assert all(r == results[0] for r in results)
    if results[0] != "damaged":
        assert all(abs(s) <= LIMIT for row in results[0] for s in row)
        assert encode(tables, [(index, row) for row in results[0]]) == data


def gaussian_tables_once(made=[]):  # noqa: B006
    if not made:
        made.append(gaussian_tables([0.11, 0.5, 3.0]))
    return made[0]


@BOTH
@pytest.mark.parametrize("data", [b"\0" * 40, b"\xff" * 40, b"\xff" * 3], ids=["zeros", "ones", "short"])
def test_endless_zeros_and_ones_end(backend, data):
    tables = tables_of([[1, TOTAL - 1], [TOTAL - 1, 1]], [0, 0])
    with pytest.raises(Damaged):
        decode(tables, data, [np.ones(3, int), np.zeros(500, int)], backend)


@BOTH
def test_an_escape_beyond_the_limit_is_damaged(backend):
    """Written as an escape of a table whose range ends lower, read with one that ends higher."""
    written, read = tables_of([[1, TOTAL - 1]], [0]), tables_of([[1, TOTAL - 1]], [10])
    data = encode(written, [([0], [LIMIT])], backend)
    with pytest.raises(Damaged, match="limit is 16383"):
        decode(read, data, [[0]], backend)


@BOTH
def test_an_escape_of_sixteen_zeros_is_damaged(backend):
    tables = tables_of([[1, TOTAL - 1]], [0])
    bits = tables_of([[TOTAL // 2, TOTAL // 2], [1, TOTAL - 1]], [0, 0])
    coder = Encoder(bits, "reference")._coder
    coder._put(1, TOTAL - 1)
    for _ in range(16):
        coder._put(0, TOTAL // 2)
    with pytest.raises(Damaged, match="prefix"):
        decode(tables, coder.finish(), [[0]], backend)


@pytest.mark.parametrize(
    "index, symbols, message",
    [([2], [0], "there are 1 tables"), ([-1], [0], "there are 1 tables"), ([0], [LIMIT + 1], "clip them"),
     ([0, 0], [0], "1 symbols for 2"), ([[0]], [[0]], "one row of integers"), ([0], [0.5], "one row of integers"),
     ([0], None, "one row of integers")])
def test_wrong_arguments_are_named(index, symbols, message):
    with pytest.raises(UsageError, match=message):
        Encoder(tables_of([[1, TOTAL - 1]], [0])).code(index, symbols)


def test_a_backend_that_is_not_there_is_an_error(monkeypatch):
    tables = tables_of([[1, TOTAL - 1]], [0])
    with pytest.raises(UsageError, match="there are constriction, reference"):
        Encoder(tables, "rans")
    monkeypatch.setattr("linic.rangecoder.find_spec", lambda name: None)
    assert backends_here() == ["reference"]
    assert type(Encoder(tables)._coder).__module__.endswith("reference")
    with pytest.raises(BackendMissing, match="pip install constriction"):
        Encoder(tables, "constriction")


@pytest.mark.parametrize("backend", backends_here())
def test_bits_are_what_the_intervals_are_worth(backend):
    tables = Tables([1 << 23, 1 << 22, 1 << 22], [3], [0])
    coder = Encoder(tables, backend)
    for n in range(1, 200):
        coder.code([0], [n % 2])    # one bit, or two
        assert coder.bits() == pytest.approx(n + (n + 1) // 2, abs=0.1)
    assert len(coder.finish()) < coder.bits() / 8 + 1.5
