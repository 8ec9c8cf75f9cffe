"""RMSNorm, RoPE, SwiGLU and the chunked loss of kernels.py against their twins."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from model_baseline import GPTConfig, apply_rope, rope_cos_sin
from tests.kernel_checks import check, compiled_equals_eager, dtypes, kernels_run, opcheck, random, results  # noqa: F401


@dtypes
@pytest.mark.parametrize("shape", [(3, 5, 96), (1, 64), (2, 127, 97), (700, 128)])
def test_rms_norm_with_and_without_a_sum_agrees_with_its_twin(shape, dtype):
    x, r, w = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype), random(shape[-1], seed=2, dtype=dtype)
    ours, twin = (lambda x, w, f=f: f(x, w, 1e-6) for f in (kernels.rms_norm, kernels.rms_norm_ref))
    check(ours, twin, [x, w])
    ours, twin = (lambda *a, f=f: f(*a, 1e-6) for f in (kernels.add_rms_norm, kernels.add_rms_norm_ref))
    check(ours, twin, [x, r, w])


def test_rms_norm_takes_an_fp32_weight_for_fp16_rows_views_and_expanded_gradients():
    whole, w = random(4, 6, 64, dtype=torch.float16), random(32, seed=1)
    grads = []
    for f in (kernels.rms_norm, kernels.rms_norm_ref):
        x, weight = whole.clone().requires_grad_(), w.clone().requires_grad_()
        f(x[:, ::2, 16:48], weight, 1e-6).sum().backward()
        assert weight.grad.dtype == torch.float32
        grads.append((x.grad, weight.grad))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_add_rms_norm_where_only_the_norm_or_only_the_sum_is_used(which):
    inputs = [random(3, 32), random(3, 32, seed=1)]
    weight = [random(32, seed=2)]
    ours, twin = (
        lambda x, r, w=weight[0], f=f: f(x, r, w, 1e-6)[which] for f in (kernels.add_rms_norm, kernels.add_rms_norm_ref)
    )
    check(ours, twin, inputs + weight if which == 0 else inputs)  # the sum does not depend on the weight


def test_rms_norm_falls_back_to_the_twin_for_wide_rows_fp64_and_what_would_broadcast():
    for x in (random(2, 8193), random(2, 8).double()):
        w = torch.ones(x.size(-1), dtype=x.dtype)
        assert torch.equal(kernels.rms_norm(x, w, 1e-6), kernels.rms_norm_ref(x, w, 1e-6))
        assert torch.equal(kernels.add_rms_norm(x, x, w, 1e-6)[0], kernels.add_rms_norm_ref(x, x, w, 1e-6)[0])
    x, w = random(3, 8), random(8)
    for residual in (random(8), random(3, 8).half()):
        for a, b in zip(kernels.add_rms_norm(x, residual, w, 0.0), kernels.add_rms_norm_ref(x, residual, w, 0.0)):
            assert torch.equal(a, b)
    assert torch.equal(kernels.rms_norm(x, w[:1], 1e-6), kernels.rms_norm_ref(x, w[:1], 1e-6))


def test_rms_norm_operators_pass_opcheck_and_compile():
    x, r, w = (random(6, 32).requires_grad_(), random(6, 32, seed=1), random(32, seed=2).requires_grad_())
    opcheck(kernels._rms_norm, x, None, w, 1e-6)
    opcheck(kernels._rms_norm, x, r, w, 1e-6)
    opcheck(kernels._rms_norm_backward, r, None, r, w.detach(), torch.ones(6))
    compiled_equals_eager(lambda x, w: sum(kernels.add_rms_norm(kernels.rms_norm(x * 2, w, 1e-6), x, w, 1e-6)), [x, w])


def angles(T, D, B=None):
    positions = torch.arange(T) if B is None else torch.arange(T) + 3 * torch.arange(B)[:, None]
    return rope_cos_sin(positions, GPTConfig(head_dim=D, rope_theta=100.0))


# B, T, H, D: the widest head, odd widths, one row, several programs, several heads a program
SHAPES = [(3, 5, 2, 24), (1, 127, 3, 48), (1, 1, 1, 16), (2, 9, 1, 256), (1, 40, 16, 128), (3, 7, 5, 98)]


@dtypes
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("B, T, H, D", SHAPES)
def test_rope_and_norm_rope_agree_with_their_twins(B, T, H, D, per_row, dtype):
    cos, sin = angles(T, D, B if per_row else None)
    x, w = random(B, T, H, D, dtype=dtype) * 3, 1 + 0.3 * random(D, seed=1, dtype=dtype)
    check(lambda x: kernels.rope(x, cos, sin), lambda x: kernels.rope_ref(x, cos, sin), [x])
    ours, twin = (lambda x, w, f=f: f(x, w, 1e-6, cos, sin) for f in (kernels.norm_rope, kernels.norm_rope_ref))
    check(ours, twin, [x, w])


def test_norm_rope_sums_weight_gradients_over_rows_that_one_program_loops_over(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    cos, sin = angles(61, 64)
    ours, twin = (lambda x, w, f=f: f(x, w, 1e-6, cos, sin) for f in (kernels.norm_rope, kernels.norm_rope_ref))
    check(ours, twin, [random(1, 61, 5, 64), random(64, seed=1)])


def test_norm_rope_takes_an_fp32_weight_for_fp16_heads():
    cos, sin = angles(7, 24)
    ours, twin = (lambda x, w, f=f: f(x, w, 1e-6, cos, sin) for f in (kernels.norm_rope, kernels.norm_rope_ref))
    check(ours, twin, [random(2, 7, 3, 24, dtype=torch.float16), random(24, seed=1)])


def test_norm_rope_with_eps_0_keeps_padding_rows_out_of_the_weight_gradient():
    cos, sin = angles(5, 24)
    ours, twin = (lambda x, w, f=f: f(x, w, 0.0, cos, sin) for f in (kernels.norm_rope, kernels.norm_rope_ref))
    check(ours, twin, [random(1, 5, 1, 24), random(24, seed=1)])


def test_rope_takes_views_and_expanded_gradients():
    cos, sin = (z.expand(2, -1, -1, -1) for z in angles(7, 16))
    whole, w = random(2, 7, 3 * 40), random(16, seed=1)
    ours, twin = [], []
    for out, rope, norm in ((ours, kernels.rope, kernels.norm_rope), (twin, kernels.rope_ref, kernels.norm_rope_ref)):
        leaf, weight = whole.clone().requires_grad_(), w.clone().requires_grad_()
        x = leaf.view(2, 7, 3, 40)[..., 8:24]
        y = norm(rope(x, cos, sin), weight, 1e-6, cos, sin)
        y.sum().backward()
        out += [y, leaf.grad, weight.grad]
    for a, b in zip(ours, twin):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_the_twin_of_rope_is_the_models():
    x, (cos, sin) = random(2, 9, 3, 32), angles(9, 32, 2)
    assert torch.equal(kernels.rope_ref(x, cos, sin), apply_rope(x, cos, sin))


def test_rope_turned_back_is_what_it_was():
    x, (cos, sin) = random(2, 9, 3, 32), angles(9, 32)
    torch.testing.assert_close(kernels.rope(kernels.rope(x, cos, sin), cos, -sin), x)


def test_rope_falls_back_to_the_twin_for_heads_over_256_and_other_angles():
    x, w = random(1, 5, 2, 258), random(258)
    cos, sin = angles(5, 258)
    assert torch.equal(kernels.rope(x, cos, sin), kernels.rope_ref(x, cos, sin))
    assert torch.equal(kernels.norm_rope(x, w, 1e-6, cos, sin), kernels.norm_rope_ref(x, w, 1e-6, cos, sin))
    x, cos, sin = random(5, 5, 2, 16), random(5, 1, 1, 8), random(5, 1, 1, 8, seed=1)  # an angle per row, not per token
    assert torch.equal(kernels.rope(x, cos, sin), kernels.rope_ref(x, cos, sin))
    x = x.bfloat16()
    assert torch.equal(kernels.rope(x, cos, sin), kernels.rope_ref(x, cos, sin))


def test_rope_operators_pass_opcheck_and_compile():
    x, w = random(2, 5, 3, 24).requires_grad_(), random(24).requires_grad_()
    cos, sin = angles(5, 24)
    opcheck(kernels._rope, x, None, cos, sin, 0.0, 1.0)
    opcheck(kernels._rope, x, w, cos, sin, 1e-6, 1.0)
    opcheck(kernels._norm_rope_backward, x.detach(), x.detach(), w.detach(), cos, sin, 1e-6)

    def both(x, w):
        return kernels.norm_rope(x.transpose(1, 2).transpose(1, 2) * 2, w, 1e-6, cos, sin) + kernels.rope(x, cos, sin)

    compiled_equals_eager(both, [x, w])


@dtypes
@pytest.mark.parametrize("shape", [(1,), (3, 127, 97), (2, 4096), (4097,)])
def test_swiglu_agrees_with_its_twin(shape, dtype):
    g, u = random(*shape, dtype=dtype) * 4, random(*shape, seed=1, dtype=dtype)
    check(kernels.swiglu, kernels.swiglu_ref, [g, u])


def test_swiglu_is_finite_at_the_ends_of_fp16():
    g = torch.tensor([-60000.0, -100.0, 0.0, 100.0, 60000.0], dtype=torch.float16)
    check(kernels.swiglu, kernels.swiglu_ref, [g, torch.full_like(g, 0.5)])


def test_swiglu_takes_chunks_and_expanded_gradients():
    grads = []
    for f in (kernels.swiglu, kernels.swiglu_ref):
        leaf = random(3, 5, 64).requires_grad_()
        f(*leaf.chunk(2, dim=-1)).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_swiglu_operators_pass_opcheck_and_compile():
    g, u = random(6, 32).requires_grad_(), random(6, 32, seed=1).requires_grad_()
    opcheck(kernels._swiglu, g, u)
    opcheck(kernels._swiglu_backward, g.detach(), g.detach(), u.detach())
    compiled_equals_eager(lambda x: kernels.swiglu(*(x * 2).chunk(2, dim=-1)), [g])


def test_swiglu_falls_back_to_the_twin_for_other_shapes_and_fp64():
    g, u = random(6, 32), random(32, seed=1)
    assert torch.equal(kernels.swiglu(g, u), kernels.swiglu_ref(g, u))
    assert torch.equal(kernels.swiglu(g, u.half()), kernels.swiglu_ref(g, u.half()))
    assert torch.equal(kernels.swiglu(g.double(), g.double()), kernels.swiglu_ref(g.double(), g.double()))


def tokens(N, V, ignored=0.3):
    g = torch.Generator().manual_seed(2)
    targets = torch.randint(V, (N,), generator=g)
    return torch.where(torch.rand(N, generator=g) < ignored, -1, targets)


def problem(N, C, V, dtype=torch.float32):
    return random(N, C, dtype=dtype), random(V, C, seed=1, dtype=dtype) * (3 / C**0.5)


@dtypes
@pytest.mark.parametrize("N, V, ignored", [(1, 97, 0.0), (5, 300, 0.4), (130, 97, 0.0), (130, 300, 0.4)])
def test_linear_cross_entropy_agrees_with_its_twin(N, V, ignored, dtype):
    targets = tokens(N, V, ignored)
    ours = lambda x, w: kernels.linear_cross_entropy(x, w, targets, chunk=64)  # noqa: E731
    twin = lambda x, w: kernels.linear_cross_entropy_ref(x, w, targets)  # noqa: E731
    x, w = problem(N, 48, V, dtype)
    assert ours(x, w).dtype == torch.float32 and ours(x, w).requires_grad is False
    floor = 1e-6 if dtype == torch.float32 else 1e-3 if N == 1 else 3e-4  # one row: its error is that of one rounding
    check(ours, twin, [x, w], floor=floor)


def test_a_vocabulary_of_several_blocks():
    targets = torch.tensor([0, 8191, 8192, 20000, -1, 16384])
    x, w = problem(6, 16, 20001)
    ours = lambda x, w: kernels.linear_cross_entropy(x, w, targets, chunk=6)  # noqa: E731
    check(ours, lambda x, w: kernels.linear_cross_entropy_ref(x, w, targets), [x, w], floor=1e-6)
    x[:] = w[[20000] * 6] * 30  # the greatest logit last, far above the others
    check(ours, lambda x, w: kernels.linear_cross_entropy_ref(x, w, targets), [x, w], floor=1e-6)


def test_the_incoming_gradient_scales_both_gradients():
    x, w, targets = *problem(20, 24, 97), tokens(20, 97)
    losses = [lambda x, w, k=k: k * kernels.linear_cross_entropy(x, w, targets, 8) for k in (1, 3)]
    grads = [results(loss, [x, w], [torch.ones(())])[1:] for loss in losses]
    for one, three in zip(*grads):
        assert one.norm() > 0
        torch.testing.assert_close(3 * one, three)


def test_all_targets_ignored_give_the_twins_nan_and_zero_gradients():
    x, w, targets = *problem(5, 24, 97), torch.full((5,), -1)
    ours = results(lambda x, w: kernels.linear_cross_entropy(x, w, targets, 4), [x, w])
    theirs = results(lambda x, w: kernels.linear_cross_entropy_ref(x, w, targets), [x, w])
    assert ours[0].isnan() and theirs[0].isnan()
    for a, b in zip(ours[1:], theirs[1:]):
        assert torch.equal(a, b) and not a.any()


def test_a_target_that_is_no_token_reads_nothing_and_makes_the_loss_nan():
    x, w = problem(4, 16, 97)
    for bad in (97, -2, 10**15, -(10**15)):
        assert kernels.linear_cross_entropy(x, w, torch.tensor([3, bad, -1, 0]), 4).isnan()


def test_chunk_sizes_agree():
    x, w, targets = *problem(70, 24, 97), tokens(70, 97)
    a, b, c = (results(lambda x, w, k=k: kernels.linear_cross_entropy(x, w, targets, k), [x, w]) for k in (16, 64, 999))
    for one, two, three in zip(a, b, c):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-7)


def test_without_gradients_the_loss_is_the_same_and_no_gradient_is_made(monkeypatch):
    x, w, targets = *problem(20, 24, 97), tokens(20, 97)
    loss = kernels.linear_cross_entropy(x.requires_grad_(), w, targets, 8).detach()
    monkeypatch.setattr(kernels, "_add_product", None)  # calling it would raise
    assert torch.equal(kernels.linear_cross_entropy(x.detach(), w, targets, 8), loss)
    with torch.no_grad():
        assert torch.equal(kernels.linear_cross_entropy(x, w, targets, 8), loss)


def test_only_one_of_the_inputs_wants_a_gradient():
    x, w, targets = *problem(20, 24, 97), tokens(20, 97)
    both = lambda x, w: kernels.linear_cross_entropy(x, w, targets, 8)  # noqa: E731
    (_, dx, dw), one = results(both, [x, w], [torch.ones(())]), [torch.ones(())]
    assert torch.equal(results(lambda x: both(x, w), [x], one)[1], dx)
    assert torch.equal(results(lambda w: both(x, w), [w], one)[1], dw)


def test_no_tensor_of_all_logits_exists():
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for y in out if isinstance(out, (tuple, list)) else [out]:
                self.bytes = max(self.bytes, y.nbytes if torch.is_tensor(y) else 0)
            return out

    N, C, V, chunk = 64, 8, 97, 16
    x, w, targets = *problem(N, C, V), tokens(N, V)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    with Largest() as mode:
        kernels._linear_cross_entropy._init_fn(x, w, targets, chunk, True)  # a mode does not see into an operator
        assert mode.bytes == chunk * V * 4
        kernels.linear_cross_entropy(*leaves, targets, chunk).backward()
        assert mode.bytes == chunk * V * 4
        kernels.linear_cross_entropy_ref(*leaves, targets)
        assert mode.bytes == N * V * 4


def test_views_and_other_weight_dtypes():
    whole, weight, targets = random(6, 3, 32), problem(1, 16, 97)[1], tokens(6, 97)
    out = []
    for f in (kernels.linear_cross_entropy, kernels.linear_cross_entropy_ref):
        x, w = whole.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = f(x[:, 1, ::2].half(), (w if f is kernels.linear_cross_entropy else w.half()), targets)
        loss.backward()
        assert w.grad.dtype == torch.float32
        out.append([loss, x.grad, w.grad])
    for a, b in zip(*out):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


def test_autocast_casts_both_as_a_linear_layer_would():
    x, w, targets = *problem(6, 16, 97), tokens(6, 97)
    with torch.autocast("cpu", torch.float16):
        ours = results(lambda x, w: kernels.linear_cross_entropy(x, w, targets, 4), [x, w])
    half = results(lambda x, w: kernels.linear_cross_entropy(x, w, targets, 4), [x.half(), w.half()])
    assert torch.equal(ours[0], half[0]) and ours[0].dtype == torch.float32
    for a, b in zip(ours[1:], half[1:]):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_linear_cross_entropy_falls_back_to_the_twin_for_bf16_and_fp64():
    x, w, targets = *problem(6, 16, 97), tokens(6, 97)
    for y, v in ((x.bfloat16(), w.bfloat16()), (x.double(), w.double())):
        assert torch.equal(kernels.linear_cross_entropy(y, v, targets), kernels.linear_cross_entropy_ref(y, v, targets))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.linear_cross_entropy(x, w, targets), kernels.linear_cross_entropy_ref(x, w, targets))
        y, v = x.double(), w.double()
        exact = F.cross_entropy(y @ v.T, targets, ignore_index=-1)
        assert torch.equal(kernels.linear_cross_entropy(y, v, targets), exact)


def test_linear_cross_entropy_passes_opcheck_and_compiles():
    x, w, targets = *problem(6, 16, 97), tokens(6, 97)
    opcheck(kernels._linear_cross_entropy, x, w, targets, 4, False)
    opcheck(kernels._linear_cross_entropy, x.requires_grad_(), w.requires_grad_(), targets, 4, True)
    compiled_equals_eager(lambda x, w: 3 * kernels.linear_cross_entropy(x * 2, w, targets, 4), [x, w])
    compiled = torch.compile(kernels.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, w, targets, 4), kernels.linear_cross_entropy(x, w, targets, 4))
