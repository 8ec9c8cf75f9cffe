"""The gated delta rule of kernels_delta.py against its twin, and the twin against a loop over tokens."""

import pytest
import torch
import torch.nn.functional as F

import kernels_delta
from model_hybrid import chunked_delta_rule
from tests.kernel_checks import check, compiled_equals_eager, kernels_run, opcheck, results  # noqa: F401

rule, twin = kernels_delta.gated_delta_rule, kernels_delta.gated_delta_rule_ref
SIZES = dict(T=130, B=1, H=2, Dk=16, Dv=16)


def inputs(dtype=torch.float32, firsts=(), decay=0.1, repeat=False, shared=True, **sizes):
    """As the model makes them: views of (B, T, H, .), keys of length 1, queries of length Dk^-0.5."""
    T, B, H, Dk, Dv = (SIZES | sizes).values()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=g) for D in (Dk, Dk, Dv))
    k = k[:, :1].expand_as(k) if repeat else k
    q, k = F.normalize(q, dim=-1) * Dk**-0.5, F.normalize(k, dim=-1)
    log_decay = -decay * torch.randn(B, T, H, generator=g).abs()
    log_decay[:, 0] *= decay < 1  # else the state's gradient is under the least number of fp16
    beta = torch.ones(B, T, H) if repeat else torch.randn(B, T, H, generator=g).sigmoid()
    first = torch.zeros(1 if shared else B, 1, T, dtype=torch.bool)
    for i, t in enumerate(firsts):
        first[i % len(first), :, t] = True
    state = torch.randn(B, H, Dk, Dv, generator=g)
    q, k, v, log_decay, beta = (x.transpose(1, 2) for x in (q.to(dtype), k.to(dtype), v.to(dtype), log_decay, beta))
    return [q, k, v, log_decay, beta, first, state]


def loop(q, k, v, log_decay, beta, first, state):
    """The definition, token by token."""
    ys = []
    for t in range(q.size(2)):
        state = state * (log_decay[:, :, t].exp() * ~first[:, :, t])[..., None, None]
        written = (v[:, :, t] - torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * written[:, :, None]
        ys.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(ys, dim=2), state


CASES = {
    "one token": dict(T=1, firsts=()),
    "one token that begins a document": dict(T=1, firsts=(0,)),
    "five": dict(T=5, B=3, H=1),
    "a chunk": dict(T=64),
    "a chunk and one": dict(T=65, firsts=(64,)),
    "prime": dict(T=127, B=3, H=1, Dk=8, Dv=6),
    "three chunks": dict(T=130, firsts=(3, 64, 100, 127, 128)),
    "documents of each row": dict(T=130, B=3, H=1, firsts=(1, 63, 64, 65, 100, 129), shared=False),
    "no past at all": dict(T=70, decay=0.0),
    "strong decay": dict(T=130, decay=60.0, firsts=(90,)),
    "odd widths": dict(T=66, H=1, Dk=40, Dv=72, firsts=(20,)),
    "wide": dict(T=65, H=1, Dk=128, Dv=128),
    "repeated keys": dict(T=130, repeat=True, decay=0.0),
    "repeated keys, decay": dict(T=64, repeat=True, decay=0.01, Dk=32),
}


@pytest.mark.parametrize("case", CASES)
def test_the_twin_is_the_recurrence(case):
    exact = [x.double() if x.is_floating_point() else x for x in inputs(**CASES[case])]
    for a, b in zip(results(twin, exact), results(loop, exact)):
        assert (a - b).norm() <= 1e-11 * b.norm()


@pytest.mark.parametrize("case", CASES)
def test_the_rules_outputs_and_gradients_in_fp32(case):
    check(rule, twin, inputs(**CASES[case]), floor=1e-6)


def test_a_decay_of_nothing_to_zero_forgets_and_gives_no_nan():
    given = inputs(T=66, H=1, firsts=(40,))
    given[3][:, :, [0, 3, 50, 64, 65]] = -torch.inf
    check(rule, twin, given, floor=1e-6)
    exact = [x.double() if x.is_floating_point() else x for x in given]
    for a, b in zip(results(twin, exact), results(loop, exact)):
        assert (a - b).norm() <= 1e-11 * b.norm()


HALF = ("five", "a chunk and one", "prime", "documents of each row", "strong decay", "wide", "repeated keys, decay")


@pytest.mark.parametrize("case", HALF)
def test_the_rules_outputs_and_gradients_in_fp16(case):
    check(rule, twin, inputs(torch.float16, **CASES[case]), floor=5e-3)


def test_a_later_token_changes_no_earlier_output():
    a, b = inputs(firsts=(30,)), [x.clone() for x in inputs(firsts=(30,))]
    for i in range(6):
        b[i][:, :, 77:] = ~b[i][:, :, 77:] if i == 5 else b[i][:, :, 77:] * 0.5
    (y, last), (z, other) = rule(*a), rule(*b)
    assert torch.equal(y[:, :, :77], z[:, :, :77]) and not torch.equal(y[:, :, 77], z[:, :, 77])
    assert not torch.equal(last, other)


def test_a_document_sees_neither_state_nor_what_came_before():
    x = inputs(firsts=(70,))
    y, last = rule(*x)
    parts = [t[:, :, 70:] for t in x[:6]]
    z, other = twin(*parts, x[6] * 0)
    assert (y[:, :, 70:] - z).norm() <= 1e-6 * z.norm() and (last - other).norm() <= 1e-6 * other.norm()


def test_two_halves_with_the_state_between_are_one_whole():
    x = inputs(T=100)
    y, last = rule(*x)
    a, state = rule(*(t[:, :, :37] for t in x[:6]), x[6])
    b, state = rule(*(t[:, :, 37:] for t in x[:6]), state)
    whole = torch.cat((a, b), dim=2)
    assert (y - whole).norm() <= 1e-6 * y.norm() and (last - state).norm() <= 1e-6 * last.norm()


def test_contiguous_inputs_and_expanded_gradients():
    x = [t.contiguous() for t in inputs(T=70)]
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in x]
    again = [t.clone().requires_grad_() if t.is_floating_point() else t for t in x]
    for function, at in ((rule, leaves), (twin, again)):
        y, last = function(*at)
        y.sum().backward() if function is rule else torch.autograd.backward([y], [torch.ones_like(y)])
    for i in (0, 1, 2, 3, 4, 6):
        a, b = leaves[i].grad, again[i].grad
        assert (a - b).norm() <= 2e-6 * b.norm().clamp(min=1e-6), i


def test_gated_delta_rule_operators_pass_opcheck():
    q, k, v, log_decay, beta, first, state = inputs(T=70, H=1)
    x = [t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v, log_decay, beta)]
    document = torch.zeros(1, 70, dtype=torch.int32)
    opcheck(kernels_delta._gated_delta_rule, *x, document, state.requires_grad_())
    y, last = kernels_delta._gated_delta_rule(*x, document, state)
    x = [t.detach() for t in x]
    dy, dlast = torch.ones_like(y), torch.ones_like(last)
    opcheck(kernels_delta._gated_delta_rule_backward, dy, dlast, *x, document, state.detach())


def test_gated_delta_rule_compiled_is_eager():
    compiled_equals_eager(rule, inputs(T=70, H=1, firsts=(9,)))


def test_the_twin_of_the_delta_rule_is_the_models():
    x = inputs(firsts=(3, 64, 100))
    assert all(torch.equal(a, b) for a, b in zip(twin(*x), chunked_delta_rule(*x)))


@pytest.mark.parametrize("case", ["wide heads", "mixed types", "fp64", "state in fp64"])
def test_gated_delta_rule_falls_back_to_the_twin(case):
    x = inputs(T=5, Dk=129) if case == "wide heads" else inputs(T=5)
    if case == "mixed types":
        x[0] = x[0].half()
    if case == "state in fp64":
        x[6] = x[6].double()
    if case == "fp64":
        x = [t.double() if t.is_floating_point() else t for t in x]
    assert all(torch.equal(a, b) for a, b in zip(rule(*x), twin(*x)))
