"""flash_attention of kernels.py against its twin, and what may not depend on what."""

from functools import partial

import pytest
import torch

import kernels
from tests.kernel_checks import check, compiled_equals_eager, dtypes, kernels_run, opcheck, results  # noqa: F401

FLOORS = {torch.float32: 1e-6, torch.float16: 1e-3}


def draw(B, H, G, T, D, dtype=torch.float32, seed=0):
    """q, k, v as the models have them: views of (B, T, heads, D)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=g).to(dtype).transpose(1, 2) for heads in (H, G, G)]


def documents(B, T, *begins):
    """start (B, T) of documents that begin at 0 and at these positions, in row b shifted by b."""
    start = torch.zeros(B, T, dtype=torch.int32)
    for b in range(B):
        for begin in begins:
            start[b, begin + b :] = begin + b
    return start


def compare(q, k, v, **options):
    check(
        lambda *x: kernels.flash_attention(*x, **options),
        lambda *x: kernels.flash_attention_ref(*x, **options),
        [q, k, v],
        floor=FLOORS[q.dtype],
    )


@dtypes
@pytest.mark.parametrize("shape", [(1, 2, 1, 127, 16), (2, 1, 1, 65, 32), (3, 2, 1, 17, 64), (1, 1, 1, 64, 128)])
def test_causal_and_full_attention_equal_the_definition(shape, dtype):
    compare(*draw(*shape, dtype))
    compare(*draw(*shape, dtype), causal=False)


@dtypes
@pytest.mark.parametrize("window", [3, 40, 64, 129, 500])
def test_a_window_leaves_only_the_last_keys(window, dtype):
    compare(*draw(1, 1, 1, 130, 16, dtype), window=window)


@pytest.mark.parametrize("options", [dict(T=1), dict(T=1, causal=False), dict(T=70, window=1)])
def test_one_key_is_copied_and_its_score_has_no_gradient(options):
    options = dict(options)
    q, k, v = draw(3, 2, 1, options.pop("T"), 16)
    y, dq, dk, dv = results(lambda *x: kernels.flash_attention(*x, **options), [q, k, v])
    wanted = results(lambda *x: kernels.flash_attention_ref(*x, **options), [q, k, v])
    assert torch.equal(y, v.expand_as(y)) and torch.allclose(dv, wanted[3], rtol=1e-6, atol=1e-6)
    assert dq.abs().max() < 1e-5 > dk.abs().max()


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("begins", [(1,), (5, 6, 77, 120), (64, 127), tuple(range(1, 127))])
def test_documents_do_not_see_each_other(begins, window):
    compare(*draw(2, 1, 1, 130, 16), start=documents(2, 130, *begins), window=window)


def test_documents_in_fp16_and_any_start():
    compare(*draw(2, 2, 1, 97, 32, torch.float16), start=documents(2, 97, 7, 50), window=40)
    start = torch.randint(0, 98, (1, 97), generator=torch.Generator().manual_seed(0)) % (torch.arange(97) + 1)
    compare(*draw(1, 1, 1, 97, 16), start=start)


@pytest.mark.parametrize("heads", [(8, 2), (16, 1)])
def test_heads_of_a_group_share_keys_and_their_gradients_add(heads):
    compare(*draw(2, *heads, 33, 16), window=30, start=documents(2, 33, 20))


def test_scale_and_layouts():
    q, k, v = draw(2, 4, 2, 40, 32)
    compare(q, k, v, scale=0.7)
    compare(q, k.contiguous(), v.contiguous())
    compare(q.contiguous(), k, v.contiguous())
    qkv = torch.randn(2, 40, 8, 32, generator=torch.Generator().manual_seed(0))  # one matrix for all three
    merged = [
        lambda x, f=f: f(*x.transpose(1, 2).split([4, 2, 2], dim=1), window=9)
        for f in (kernels.flash_attention, kernels.flash_attention_ref)
    ]
    check(*merged, [qkv], floor=1e-6)
    y = kernels.flash_attention(q, k, v)
    assert y.transpose(1, 2).is_contiguous() and y.shape == q.shape
    odd = q.transpose(2, 3).contiguous().transpose(2, 3)  # not D last in memory
    assert torch.equal(kernels.flash_attention(odd, k, v), y)
    expanded, copied = v[:, :1].expand(-1, 2, -1, -1), v[:, [0, 0]]
    assert torch.equal(kernels.flash_attention(q, k, expanded), kernels.flash_attention(q, k, copied))


def test_scores_that_exp_would_overflow_on_leave_everything_finite():
    q, k, v = draw(1, 2, 1, 100, 16)  # a probability is known to |score| x 6e-8 only
    for options in (dict(), dict(window=7)):
        ours, theirs = (
            results(partial(f, **options), [q * 30, k * 30, v])
            for f in (kernels.flash_attention, kernels.flash_attention_ref)
        )
        for a, b in zip(ours, theirs):
            assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("std, bounds", [(36, [1.25, 1.3, 2.0, 5.0]), (400, [1.5, 1.5, 3.0, 25.0])])
def test_the_error_of_dv_in_fp32_grows_with_the_scores_as_far_as_the_docs_say(std, bounds):
    q, k, v = draw(1, 1, 1, 200, 64)
    given = [q * std**0.5, k * std**0.5, v]
    exact = results(kernels.flash_attention_ref, [x.double() for x in given])
    ours, theirs = (results(f, given) for f in (kernels.flash_attention, kernels.flash_attention_ref))
    for a, b, e, bound in zip(ours, theirs, exact, bounds):
        assert (a - e).norm() <= bound * (b - e).norm()


@pytest.mark.parametrize("window", [0, 7])
def test_changing_a_key_leaves_earlier_rows_bit_equal(window):
    q, k, v = draw(1, 2, 1, 130, 16)
    y = kernels.flash_attention(q, k, v, window=window)
    for t in (0, 63, 64, 100):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t + 1 :], v2[:, :, t + 1 :] = 9.0, -9.0
        assert torch.equal(kernels.flash_attention(q, k2, v2, window=window)[:, :, : t + 1], y[:, :, : t + 1])
        if window and t >= window:
            k2, v2 = k.clone(), v.clone()
            k2[:, :, : t - window + 1], v2[:, :, : t - window + 1] = 9.0, -9.0
            assert torch.equal(kernels.flash_attention(q, k2, v2, window=window)[:, :, t:], y[:, :, t:])


def test_a_document_is_bit_equal_whatever_stands_in_the_others():
    (q, k, v), start = draw(1, 2, 1, 130, 16), documents(1, 130, 37, 90)
    first = results(lambda *x: kernels.flash_attention(*x, start=start)[:, :, 37:90], [q, k, v])
    for x in (q, k, v):
        x[:, :, :37], x[:, :, 90:] = 5.0, -7.0
    second = results(lambda *x: kernels.flash_attention(*x, start=start)[:, :, 37:90], [q, k, v])
    assert torch.equal(first[0], second[0])
    for a, b in zip(first[1:], second[1:]):
        assert torch.equal(a[:, :, 37:90], b[:, :, 37:90])
    assert all(x[:, :, :37].abs().max() == 0 == x[:, :, 90:].abs().max() for x in second[1:])


def test_expanded_gradients_and_one_wanted_gradient():
    q, k, v = [x.requires_grad_() for x in draw(1, 2, 1, 40, 16)]
    for f in (kernels.flash_attention, kernels.flash_attention_ref):
        f(q, k, v).sum().backward()
        f(q, k, v).backward(torch.ones(1, 1, 1, 16).expand(1, 2, 40, 16) * 0.5)
        if f is kernels.flash_attention:
            ours = [x.grad.clone() for x in (q, k, v)]
            q.grad = k.grad = v.grad = None
    for a, x in zip(ours, (q, k, v)):
        assert torch.allclose(a, x.grad, atol=1e-5)
    (dk,) = torch.autograd.grad(kernels.flash_attention(q.detach(), k, v.detach()).sum(), k)
    assert dk.shape == k.shape


def test_attention_operators_pass_opcheck():
    q, k, v = [x.requires_grad_() for x in draw(2, 2, 1, 20, 16)]
    opcheck(kernels._flash_attention, q, k, v, None, True, 0, 0.25)
    other, start = k.detach().contiguous().requires_grad_(), documents(2, 20, 7)
    opcheck(kernels._flash_attention, q, other, v, start, True, 5, 0.25)
    y, lse = (x.detach() for x in kernels._flash_attention(q, k, v, None, True, 0, 0.25))
    q, k, v = (x.detach() for x in (q, k, v))
    opcheck(kernels._flash_attention_backward, torch.randn_like(y), q, k, v, None, y, lse, True, 0, 0.25)


def test_attention_compiled_equals_eager():
    inputs, start = draw(2, 4, 2, 40, 16), documents(2, 40, 11)

    def f(q, k, v):
        y = kernels.flash_attention(q * 1.5, k, v, window=9, start=start)
        return y.transpose(1, 2).reshape(2, 40, -1).tanh()

    compiled_equals_eager(f, inputs)


def test_attention_falls_back_to_the_twin_for_other_shapes(monkeypatch):
    q, k, v = draw(1, 2, 1, 12, 24)
    launched = []
    monkeypatch.setattr(kernels, "_flash_attention", lambda *a: launched.append(a) or (a[0],))
    cases = [(q, k, v), (q[..., :16], k[..., :16], v), (q[:, :, 3:, :16], k[..., :16], v[..., :16])]
    cases += [(q[..., :16].expand(3, -1, -1, -1), k[..., :16], v[..., :16])]
    cases += [(q[..., :16].double(), k[..., :16].double(), v[..., :16].double())]
    for a in cases:
        assert torch.equal(kernels.flash_attention(*a, window=4), kernels.flash_attention_ref(*a, window=4))
    assert not launched
    q, k, v = (x[..., :16] for x in (q, k, v))
    kernels.flash_attention(q, k, v)
    assert len(launched) == 1
    # a chunk of queries at the end sees the past
    a, b = kernels.flash_attention_ref(q, k, v), kernels.flash_attention_ref(q[:, :, 9:], k, v)
    assert torch.allclose(a[:, :, 9:], b, atol=1e-6)
    for options in (dict(window=3), dict(start=documents(1, 12))):
        with pytest.raises(ValueError, match="causal"):
            kernels.flash_attention(q, k, v, causal=False, **options)
