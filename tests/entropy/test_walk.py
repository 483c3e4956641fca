import numpy as np

from linic.entropy.walk import Step, walk
from linic.rangecoder import Decoder, Encoder, Tables


def plan(wanted):
    """Two steps; the tables of the second depend on the symbols of the first."""
    first = yield Step(np.array([0, 1, 0], np.int32), None if wanted is None else wanted[0])
    second = yield Step((first > 0).astype(np.int32), None if wanted is None else wanted[1])
    return first, second


def test_one_walk_drives_writer_and_reader_to_the_same_latents():
    half = 1 << 23
    tables = Tables([half, half // 2, half // 2, 1 << 22, 3 << 22], [3, 2], [0, 5])
    wanted = np.array([1, 5, 0], np.int32), np.array([40, -3, 1], np.int32)
    coder = Encoder(tables)
    sent = walk(plan(wanted), coder)
    data = coder.finish()
    reader = Decoder(tables, data)
    got = walk(plan(None), reader)
    reader.finish()
    assert [s.tolist() for s in sent] == [g.tolist() for g in got] == [w.tolist() for w in wanted]
