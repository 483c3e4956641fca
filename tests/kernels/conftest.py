"""`form`: everything that computes an operator here, one after the other."""

import pytest
import torch

from linic.kernels import native

FORMS = [("torch", torch.float32, ""), ("torch", torch.float64, "")]
FORMS += [("native", torch.float32, isa) for isa in native.instruction_sets()]


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(str(x).removeprefix("torch.") for x in form if x))
def form(request):
    """(backend, dtype); the native one once per instruction set of this machine."""
    backend, dtype, isa = request.param
    if isa:
        native.use(isa)
    yield backend, dtype
    if isa:
        native.use(native.instruction_sets()[0])
