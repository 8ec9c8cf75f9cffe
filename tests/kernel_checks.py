"""How kernels are held against their twins, in the interpreter: errors to fp64, a second run, fresh memory of NaN."""

import pytest
import torch
from torch import library

import kernels

FLOORS = {torch.float32: 2e-7, torch.float16: 3e-4}  # an error below that of rounding says nothing
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch, request):
    """No kernel falls back to its twin, but in tests about just that; new tensors are full of NaN."""

    def refuse(name, reason):
        assert "falls_back" in request.node.name, f"{name} fell back to its twin: {reason}"
        return False

    assert kernels.INTERPRETED
    monkeypatch.setattr(kernels, "refuse", refuse)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_float(x):
    return torch.is_tensor(x) and x.is_floating_point()


def results(function, inputs, gradients=None):
    """Outputs of the function, then the gradients of its floating inputs, for given or random gradients of outputs."""
    leaves = [x.detach().clone().requires_grad_() if is_float(x) else x for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    gradients = gradients or [random(*y.shape, seed=1) for y in outputs]
    wanted = [x for x in leaves if is_float(x)]
    grads = torch.autograd.grad(outputs, wanted, [g.to(y.dtype) for g, y in zip(gradients, outputs)])
    return [y.detach() for y in (*outputs, *grads)]


def check(kernel, twin, inputs, floor=None):
    """Every output and gradient has at most 1.25 times the twin's error to fp64, or the floor, and none stands out."""
    floor = FLOORS[next(x.dtype for x in inputs if is_float(x))] if floor is None else floor
    exact = results(twin, [x.double() if is_float(x) else x for x in inputs])
    ours, again, theirs = results(kernel, inputs), results(kernel, inputs), results(twin, inputs)
    assert len(ours) == len(exact)
    for i, (a, b, t, e) in enumerate(zip(ours, again, theirs, exact)):
        assert a.shape == t.shape and a.dtype == t.dtype, f"result {i}: {a.dtype} {a.shape}, not {t.dtype} {t.shape}"
        assert torch.equal(a, b), f"result {i} differs on a second run"
        mine, torchs = ((y.double() - e).norm() / e.norm().clamp(min=1e-30) for y in (a, t))
        assert mine <= max(1.25 * torchs, floor), f"result {i}: error {mine:.2e}, PyTorch's {torchs:.2e}"
        if e.numel():
            worst, their_worst = ((y.double() - e).abs().max() for y in (a, t))
            limit = 4 * max(their_worst, floor * e.abs().max())
            assert worst <= limit, f"result {i}: an error of {worst:.2e}, PyTorch's worst {their_worst:.2e}"


def opcheck(operator, *inputs):
    """Schema, fake shapes and strides, autograd and the compiled form of a custom operator."""
    library.opcheck(operator, inputs)


def compiled_equals_eager(function, inputs):
    torch._dynamo.reset()
    a, b = results(function, inputs), results(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
