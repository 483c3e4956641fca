"""Range coding: integers and integer frequency tables <-> bytes. No idea of pictures, networks or files.

`Encoder.code(index, symbols)` and `Decoder.code(index)` take one step of the coding walk and both return its symbols,
so that one loop drives either. index (N,) integers: the table of each symbol; symbols (N,) integers, |s| <= 16383.
Inside a step symbols go by table; the order, the escapes and the bytes are defined in docs/format.md, section 6.
Two backends, the same bytes: constriction where it is installed, else plain Python (reference.py, the definition).
Raises WeightsError (tables), UsageError (arguments), BackendMissing, Damaged (data that no encoder wrote).
"""
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from linic.errors import BackendMissing, UsageError
from linic.rangecoder.tables import LIMIT, IntArray, Tables

__all__ = ["BACKENDS", "LIMIT", "Decoder", "Encoder", "Tables", "backends_here"]

BACKENDS = {"constriction": "linic.rangecoder.fast", "reference": "linic.rangecoder.reference"}


def backends_here() -> list[str]:
    """Those that run on this machine, the fastest first."""
    return [name for name in BACKENDS if name == "reference" or find_spec(name)]


def _load(backend: str | None) -> Any:
    here = backends_here()
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"no range coder {backend!r}; there are {', '.join(BACKENDS)}")
    if backend is not None and backend not in here:
        raise BackendMissing(f"{backend} is not installed: pip install {backend}, or take the backend 'reference'")
    return import_module(BACKENDS[backend or here[0]])


class Encoder:
    def __init__(self, tables: Tables, backend: str | None = None):
        self._tables = tables
        self._coder = _load(backend).Encoder(tables)

    def code(self, index: npt.ArrayLike, symbols: npt.ArrayLike | None) -> IntArray:
        """Write one step; the symbols come back as int32."""
        tables = _indices(index, len(self._tables))
        values = _row("symbols", symbols)
        if len(values) != len(tables):
            raise UsageError(f"{len(values)} symbols for {len(tables)} table indices")
        if len(values) and (values.min() < -LIMIT or values.max() > LIMIT):
            raise UsageError(f"symbols from {values.min()} to {values.max()}; the limit is {LIMIT}: clip them")
        return np.asarray(self._coder.code(*_shaped(self._coder, tables, values.astype(np.int32))), np.int32)

    def bits(self) -> float:
        """What everything coded so far is worth: -log2 of the interval that is left."""
        return float(self._coder.bits())

    def finish(self) -> bytes:
        """The stream of everything coded so far: the shortest that says it."""
        return bytes(self._coder.finish())


class Decoder:
    def __init__(self, tables: Tables, data: bytes, backend: str | None = None):
        self._tables = tables
        self._coder = _load(backend).Decoder(tables, bytes(data))

    def code(self, index: npt.ArrayLike, symbols: object = None) -> IntArray:
        """Read one step (int32). Damaged data may give wrong symbols: `finish` tells, and the file's checksums."""
        found = self._coder.code(*_shaped(self._coder, _indices(index, len(self._tables))))
        return np.asarray(found, np.int32)

    def finish(self) -> None:
        """Raise Damaged unless the data are, byte for byte, what an encoder writes for the symbols read."""
        self._coder.finish()


def _shaped(coder: Any, *arrays: IntArray) -> list[Any]:
    """Lists for plain Python, whose arithmetic must not fall into NumPy's wrapping integers."""
    plain = type(coder).__module__ == BACKENDS["reference"]
    return [a.tolist() if plain else a for a in arrays]


def _indices(index: npt.ArrayLike, count: int) -> IntArray:
    tables = _row("table indices", index)
    if len(tables) and (tables.min() < 0 or tables.max() >= count):
        raise UsageError(f"table indices from {tables.min()} to {tables.max()}; there are {count} tables")
    return tables


def _row(name: str, values: npt.ArrayLike | None) -> IntArray:
    array = np.asarray(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise UsageError(f"{name} must be one row of integers, not {array.dtype} {array.shape}")
    return array.astype(np.int64)
