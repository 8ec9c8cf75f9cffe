"""The mixture of experts of kernels.py against its twin, and the twin against a loop over tokens."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from tests.kernel_checks import check, compiled_equals_eager, dtypes, kernels_run, opcheck, results  # noqa: F401

HALF = 1e-3  # floor in fp16


def draw(N=37, C=48, I=24, E=6, K=2, dtype=torch.float32, experts=None):
    g = torch.Generator().manual_seed(0)
    shapes = (N, C), (E, C, I), (E, C, I), (E, I, C)
    tensors = [torch.randn(shape, generator=g) * (1 if len(shape) == 2 else shape[1] ** -0.5) for shape in shapes]
    if experts is None:
        experts = torch.rand(N, E, generator=g).topk(K).indices if K <= E else torch.randint(E, (N, K), generator=g)
    return [t.to(dtype) for t in tensors] + [experts, torch.rand(N, K, generator=g).to(dtype)]


def agree(inputs, floor=None):
    half = inputs[0].dtype == torch.float16
    check(kernels.moe, kernels.moe_ref, inputs, floor=floor or (HALF if half else 1e-6))


SIZES = [
    dict(),
    dict(N=1), dict(N=1, E=40, K=3, C=16), dict(K=1), dict(N=3, E=17, K=5),  # more experts than choices
    dict(N=127, E=3, K=1, C=97, I=33), dict(N=64, E=2, K=2, C=64, I=64),  # odd widths; whole blocks alone
    dict(N=5, C=7, I=5, E=1, K=1), dict(N=20, E=2, K=4, I=40),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_and_gradients_are_the_twins(sizes, dtype):
    agree(draw(**sizes, dtype=dtype))


@dtypes
@pytest.mark.parametrize("experts", [[3, 3], [0, 5], [5, 2]], ids=str)
def test_experts_without_tokens_get_zero_gradients(experts, dtype):
    inputs = draw(dtype=dtype, experts=torch.tensor(experts).expand(37, 2))
    agree(inputs)
    idle = [e for e in range(6) if e not in experts]
    assert all((dw[idle] == 0).all() and (dw[experts] != 0).any() for dw in results(kernels.moe, inputs)[2:5])


@dtypes
def test_a_gate_of_zero_drops_a_choice_but_has_a_gradient(dtype):
    inputs = draw(dtype=dtype)
    inputs[5][::3], inputs[5][1::3, 1] = 0, 0
    agree(inputs)
    y, *_, dgates = results(kernels.moe, inputs)
    assert (y[::3] == 0).all() and (y[1::3] != 0).any() and (dgates[::3] != 0).all()


def test_gates_stay_in_fp32_beside_half_precision():
    inputs = draw(dtype=torch.float16)
    inputs[5] = torch.rand(37, 2)
    agree(inputs)


def test_weights_of_another_dtype_are_cast_and_get_gradients_in_their_own():
    inputs = draw()
    agree([inputs[0].half(), *inputs[1:4], inputs[4], inputs[5]])


def test_inputs_and_gradients_need_not_be_contiguous():
    x, w_gate, w_up, w_down, experts, gates = draw()
    wide, turned = torch.cat((x, x), dim=1)[:, 48:], [w.mT.contiguous().mT for w in (w_gate, w_up, w_down)]
    strided = [wide, *turned, experts.mT.contiguous().mT, gates.mT.contiguous().mT]
    agree(strided)
    dy = [torch.ones(()).expand(37, 48)]
    for a, b in zip(results(kernels.moe, strided, dy), results(kernels.moe_ref, strided, dy)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_tokens():
    y, *grads = results(kernels.moe, draw(N=0))
    assert y.shape == (0, 48) and all((dw == 0).all() for dw in grads[1:4])


def test_the_twin_is_a_loop_over_tokens():
    for sizes in SIZES:
        x, w_gate, w_up, w_down, experts, gates = draw(**sizes, dtype=torch.float64)
        y = torch.zeros_like(x)
        for n, k in ((n, k) for n in range(x.size(0)) for k in range(experts.size(1))):
            e = experts[n, k]
            y[n] += gates[n, k] * ((F.silu(x[n] @ w_gate[e]) * (x[n] @ w_up[e])) @ w_down[e])
        torch.testing.assert_close(kernels.moe_ref(x, w_gate, w_up, w_down, experts, gates), y)


@pytest.mark.parametrize("b", [1, 2, 7, 32, 100])
def test_tiles_hold_every_choice_once(b):
    for N, K, E in ((37, 2, 6), (1, 3, 40), (50, 1, 1), (12, 4, 4)):
        experts = torch.randint(E, (N, K), generator=torch.Generator().manual_seed(b))
        order, edge, tiles = kernels.moe_plan(experts, E, b)
        held = []
        for e, first in tiles.tolist():
            held += order[first : min(first + b, edge[e + 1])].tolist()
            assert all(experts.flatten()[choice] == e for choice in order[first : min(first + b, edge[e + 1])])
        assert sorted(held) == list(range(N * K))
    worst = torch.tensor([[0] * (b + 1), [1] * (b + 1)])  # one row more than a tile, each: no more tiles than planned
    assert len(kernels.moe_plan(worst, 2, b)[2]) == len({*map(tuple, kernels.moe_plan(worst, 2, b)[2].tolist())}) >= 3


def test_moe_operators_pass_opcheck_and_compile():
    x, w_gate, w_up, w_down, experts, gates = inputs = draw(N=9)
    plan = [t.int() for t in kernels.moe_plan(experts, 6, kernels.moe_sizes(x)[0]["BM"])]
    floats = [t.requires_grad_() for t in (x, w_gate, w_up, w_down, gates)]
    opcheck(kernels._moe, *floats, *plan)
    y, *kept = kernels._moe(*floats, *plan)
    opcheck(kernels._moe_backward, *(t.detach() for t in (y, *floats)), *plan, *(t.detach() for t in kept))
    compiled_equals_eager(kernels.moe, inputs)


def test_moe_falls_back_to_the_twin_in_fp64():
    inputs = draw(dtype=torch.float64)
    assert torch.equal(kernels.moe(*inputs), kernels.moe_ref(*inputs))
