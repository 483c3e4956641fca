"""Which backends are here, what the library does without the compiled one, and the bench that times them."""

import os
import subprocess
import sys

import torch

from linic import kernels
from linic.kernels import native


def test_backends_tells_what_is_here_and_what_runs():
    for state in kernels.backends().values():
        assert state["torch"] == "here"
        assert state["triton"].startswith(("absent: ", "here"))
        if native.lib is None:
            assert state["native"] == f"absent: {native.missing}" and state["cpu float32"] == "torch"
        else:
            assert state["native"].startswith("here (") and state["cpu float32"] == "native"


def test_linic_no_native_leaves_the_compiled_kernels_out():
    code = """if True:
        import torch
        from linic import kernels
        from linic.errors import BackendMissing
        assert kernels.backends()["biwkv"]["native"] == "absent: switched off by LINIC_NO_NATIVE"
        assert kernels.backends()["dwconv5"]["cpu float32"] == "torch"
        c, x = torch.zeros(4), torch.ones(1, 3, 4)
        assert torch.equal(kernels.biwkv(c, c, x, x), x)
        try:
            kernels.biwkv(c, c, x, x, backend="native")
        except BackendMissing as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LINIC_NO_NATIVE": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "biwkv: backend 'native' is not here: switched off by LINIC_NO_NATIVE" in run.stdout
    assert "use 'torch'" in run.stdout


def test_the_bench_times_every_backend_that_is_here(monkeypatch):
    from linic.bench import kernels as bench

    monkeypatch.setattr(bench, "BIWKV_SHAPES", [(1, 16, 8)])
    monkeypatch.setattr(bench, "DWCONV5_SHAPES", [(1, 4, 4, 8)])
    monkeypatch.setattr(bench, "MIX_SHAPE", (1, 4, 4, 8))
    threads = torch.get_num_threads()
    rows = bench.run(threads=1, repeats=1)
    assert torch.get_num_threads() == threads
    here = [name for name in ("native", "torch") if name == "torch" or native.lib is not None]
    forms = ["plain"] if native.lib is None else ["fused", "plain"]
    assert [row["backend"] for row in rows] == [*here, *here, "conv2d", *forms, *forms]
    assert all(row["both_ms"] > 0 and row["forward_ratio"] > 0 for row in rows)
    assert len(bench.table(rows).splitlines()) == 2 + len(rows)
