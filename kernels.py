"""Triton kernels for training, each below its plain PyTorch twin.

    kernels.install(model)        puts them into a model of this project; kernels.uninstall(model) takes them out

Every operation is a function `name` with a twin `name_ref`, the same in PyTorch: definition, reference and fallback.
Kernels run in fp32, fp16 and bf16 on GPUs since the H100; else, or for other shapes, the twin does, and says so once.

A section: twin, kernels, launches (custom operators: for torch.compile opaque calls with known shapes), gradient, and
the function to call. N rows of C numbers, b bytes each; other letters as in the model files. "Floor": the least time at
4.3 TB/s or 790 TFLOP/s, which one H200 reaches. The gated delta rule is in kernels_delta.py.
"""

import functools
import os
import sys
from collections import Counter
from types import FunctionType, MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.library import custom_op

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # every function is its twin
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda kernel: kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU as Python: for tests
DTYPES = (torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))  # bf16 is wrong there
SAID = set()  # (kernel, why it did not run)
# An H100 and an H200 have 132 multiprocessors of 227 KB of shared memory.
SHARED, PROGRAMS = 227 * 1024, 4 * 132  # what a program may use at most; programs of kernels that loop over rows


def operator(function):
    """A custom operator of this function; what it is given must be contiguous, what it returns is new."""

    @functools.wraps(function)
    def on_its_device(x, *rest):  # Triton launches on the current device, wherever the tensors are
        with torch.cuda.device_of(x):
            return function(x, *rest)

    return custom_op(f"nanollm::{function.__name__.strip('_')}", on_its_device, mutates_args=())


@torch.compiler.assume_constant_result  # else the print would break torch.compile's graph
def refuse(name, reason):
    if (name, reason) not in SAID:
        SAID.add((name, reason))
        print(f"kernels.{name}: {reason}: PyTorch instead", file=sys.stderr)
    return False


def runs(name: str, *tensors: Tensor, fits: bool = True) -> bool:
    """Whether the kernel can take these tensors; if not, why is printed once. fits: what its docstring asks of them."""
    device = tensors[0].device
    if triton is None or device.type != ("cpu" if INTERPRETED else "cuda"):
        return refuse(name, f"no kernel for device {device.type}" if triton else "Triton is not installed")
    if device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < SHARED:
        return refuse(name, "this GPU has less shared memory than an H100, for which the blocks are chosen")
    if odd := [x.dtype for x in tensors if x.dtype not in DTYPES]:
        return refuse(name, f"no kernel for {odd[0]}")
    return fits or refuse(name, "no kernel for these shapes or this mix of dtypes")


# ---- RMSNorm, alone or after the residual sum ------------------------------------------------------------------------
def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x, x.shape[-1:], eps=eps) * weight).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return rms_norm_ref(residual, weight, eps), residual


@jit
def rms_norm_kernel(X, R, W, Y, H, RSTD, N, C: tl.constexpr, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, mask = rows.to(tl.int64)[:, None] * C + cols[None, :], (rows < N)[:, None] & (cols < C)[None, :]
    x = tl.load(X + at, mask, 0.0).to(tl.float32)
    if R is not None:
        x = (x + tl.load(R + at, mask, 0.0).to(tl.float32)).to(H.dtype.element_ty)
        tl.store(H + at, x, mask)
        x = x.to(tl.float32)  # the norm of the sum as it is kept, rounded
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
    w = tl.load(W + cols, cols < C, 0.0).to(tl.float32)
    tl.store(Y + at, x * rstd[:, None] * w[None, :], mask)
    tl.store(RSTD + rows, rstd, rows < N)


@jit
def rms_norm_backward_kernel(DY, DH, H, W, RSTD, DX, DW, N, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    w, dw = tl.load(W + cols, cols < C, 0.0).to(tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, mask = rows.to(tl.int64)[:, None] * C + cols[None, :], (rows < N)[:, None] & (cols < C)[None, :]
        rstd = tl.load(RSTD + rows, rows < N, 0.0)[:, None]
        x = tl.load(H + at, mask, 0.0).to(tl.float32) * rstd
        dy = tl.load(DY + at, mask, 0.0).to(tl.float32)
        dw += tl.sum(dy * x, axis=0)
        dy *= w[None, :]
        dx = (dy - x * (tl.sum(dy * x, axis=1) / C)[:, None]) * rstd
        if DH is not None:
            dx += tl.load(DH + at, mask, 0.0).to(tl.float32)
        tl.store(DX + at, dx, mask)
    tl.store(DW + tl.program_id(0) * C + cols, dw, cols < C)


@operator
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    C, shape = x.size(-1), 0 if residual is None else x.shape
    N, BLOCK = x.numel() // C, triton.next_power_of_2(C)
    y, h, rstd = torch.empty_like(x), x.new_empty(shape), x.new_empty(N, dtype=torch.float32)
    ROWS = max(1, 4096 // BLOCK)
    rms_norm_kernel[(triton.cdiv(N, ROWS),)](x, residual, weight, y, h, rstd, N, C, eps, ROWS, BLOCK, num_warps=4)
    return y, h, rstd


@_rms_norm.register_fake
def _(x, residual, weight, eps):
    h = x.new_empty(0 if residual is None else x.shape)
    return torch.empty_like(x), h, x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)


@operator
def _rms_norm_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    N, C, BLOCK = rstd.numel(), h.size(-1), triton.next_power_of_2(h.size(-1))
    ROWS, warps = max(1, 4096 // BLOCK), 4 if BLOCK <= 4096 else 8
    programs = min(triton.cdiv(N, ROWS), PROGRAMS)
    dx, dw = torch.empty_like(h), h.new_empty(programs, C, dtype=torch.float32)
    rms_norm_backward_kernel[(programs,)](dy, dh, h, weight, rstd, dx, dw, N, C, ROWS, BLOCK, num_warps=warps)
    return dx, dw.sum(dim=0).to(weight.dtype)


_rms_norm_backward.register_fake(lambda dy, dh, h, weight, _: (torch.empty_like(h), torch.empty_like(weight)))


def _rms_norm_setup(ctx, inputs, output):
    ctx.add = inputs[1] is not None
    ctx.save_for_backward(output[1] if ctx.add else inputs[0], inputs[2], output[2])


def _rms_norm_gradient(ctx, dy, dh, _):
    dx, dw = _rms_norm_backward(dy.contiguous(), dh.contiguous() if ctx.add else None, *ctx.saved_tensors)
    return dx, dx if ctx.add else None, dw, None


_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_rms_norm_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: x (..., C), weight (C,) -> (..., C), in fp32 inside; C up to 8192.

    Forward 2 N C b bytes, backward 3 N C b; floor of N = 131,072, C = 1024 in bf16 at 4.3 TB/s: 0.125 and 0.187 ms.
    """
    fits = weight.shape == x.shape[-1:] and len(weight) <= 8192
    if not runs("rms_norm", x, weight, fits=fits):
        return rms_norm_ref(x, weight, eps)
    return _rms_norm(x.contiguous(), None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + residual -> rms_norm(h), h: both (..., C), in one pass. Forward and backward 4 N C b bytes."""
    fits = x.shape == residual.shape and x.dtype == residual.dtype and weight.shape == x.shape[-1:]
    if not runs("add_rms_norm", x, residual, weight, fits=fits and len(weight) <= 8192):
        return add_rms_norm_ref(x, residual, weight, eps)
    return _rms_norm(x.contiguous(), residual.contiguous(), weight, eps)[:2]


# ---- RoPE, alone or after an RMSNorm of each head --------------------------------------------------------------------
def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def norm_rope_ref(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    return rope_ref(x if weight is None else rms_norm_ref(x, weight, eps), cos, sin)


@jit
def rope_kernel(X, W, COS, SIN, Y, N, ANGLES, eps, sign, H: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)  # a row is a head of a token
    at, mask = rows.to(tl.int64)[:, None] * D + cols[None, :], (rows < N)[:, None] & (cols < D // 2)[None, :]
    angle = (rows // H % ANGLES)[:, None] * (D // 2) + cols[None, :]
    cos, sin = tl.load(COS + angle, mask, 0.0), tl.load(SIN + angle, mask, 0.0) * sign
    x1, x2 = tl.load(X + at, mask, 0.0).to(tl.float32), tl.load(X + at + D // 2, mask, 0.0).to(tl.float32)
    if NORM:
        w1, w2 = tl.load(W + cols, cols < D // 2, 0.0), tl.load(W + D // 2 + cols, cols < D // 2, 0.0)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + eps)[:, None]
        x1, x2 = x1 * rstd * w1[None, :], x2 * rstd * w2[None, :]
    tl.store(Y + at, x1 * cos - x2 * sin, mask)
    tl.store(Y + at + D // 2, x2 * cos + x1 * sin, mask)


@jit
def norm_rope_backward_kernel(DY, X, W, COS, SIN, DX, DW, N, ANGLES, eps, H: tl.constexpr, D: tl.constexpr,
                              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    w1, w2 = tl.load(W + cols, cols < D // 2, 0.0), tl.load(W + D // 2 + cols, cols < D // 2, 0.0)
    dw1, dw2 = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)  # summed over rows at the end
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        at, mask = rows.to(tl.int64)[:, None] * D + cols[None, :], (rows < N)[:, None] & (cols < D // 2)[None, :]
        angle = (rows // H % ANGLES)[:, None] * (D // 2) + cols[None, :]
        cos, sin = tl.load(COS + angle, mask, 0.0), tl.load(SIN + angle, mask, 0.0)
        x1, x2 = tl.load(X + at, mask, 0.0).to(tl.float32), tl.load(X + at + D // 2, mask, 0.0).to(tl.float32)
        dy1, dy2 = tl.load(DY + at, mask, 0.0).to(tl.float32), tl.load(DY + at + D // 2, mask, 0.0).to(tl.float32)
        # 1. x normed again, 2. dy turned back, 3. RMSNorm's backward. Past N rstd is 1, for eps = 0: no 0 * inf in dw
        rstd = tl.rsqrt(tl.where(rows < N, tl.sum(x1 * x1 + x2 * x2, axis=1) / D + eps, 1.0))[:, None]
        x1, x2 = x1 * rstd, x2 * rstd
        dy1, dy2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
        dw1, dw2 = dw1 + dy1 * x1, dw2 + dy2 * x2
        dy1, dy2 = dy1 * w1[None, :], dy2 * w2[None, :]
        mean = tl.sum(dy1 * x1 + dy2 * x2, axis=1)[:, None] / D
        tl.store(DX + at, (dy1 - x1 * mean) * rstd, mask)
        tl.store(DX + at + D // 2, (dy2 - x2 * mean) * rstd, mask)
    tl.store(DW + tl.program_id(0) * D + cols, tl.sum(dw1, axis=0), cols < D // 2)
    tl.store(DW + tl.program_id(0) * D + D // 2 + cols, tl.sum(dw2, axis=0), cols < D // 2)


@operator
def _rope(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, sign: float) -> Tensor:
    H, D = x.shape[-2:]
    N, BLOCK, y = x.numel() // D, triton.next_power_of_2(D // 2), torch.empty_like(x)
    ROWS, angles, norm = 2048 // BLOCK, cos.numel() // (D // 2), weight is not None
    rope_kernel[(triton.cdiv(N, ROWS),)](x, weight, cos, sin, y, N, angles, eps, sign, H, D, norm, ROWS, BLOCK)
    return y


_rope.register_fake(lambda x, *_: torch.empty_like(x))


@operator
def _norm_rope_backward(dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor,
                        eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, D = x.shape[-2:]
    N, BLOCK, angles = x.numel() // D, triton.next_power_of_2(D // 2), cos.numel() // (D // 2)
    ROWS, programs = 1024 // BLOCK, min(triton.cdiv(N, 1024 // BLOCK), PROGRAMS)
    dx, dw = torch.empty_like(x), x.new_empty(programs, D, dtype=torch.float32)
    norm_rope_backward_kernel[(programs,)](dy, x, weight, cos, sin, dx, dw, N, angles, eps, H, D, ROWS, BLOCK)
    return dx, dw.sum(dim=0).to(weight.dtype)


_norm_rope_backward.register_fake(lambda dy, x, weight, *_: (torch.empty_like(x), torch.empty_like(weight)))


def _rope_setup(ctx, inputs, output):
    x, weight, cos, sin, ctx.eps, ctx.sign = inputs
    ctx.save_for_backward(x if weight is not None else None, weight, cos, sin)


def _rope_gradient(ctx, dy):
    x, weight, cos, sin = ctx.saved_tensors
    if x is None:
        return _rope(dy.contiguous(), None, cos, sin, 0.0, -ctx.sign), None, None, None, None, None
    return *_norm_rope_backward(dy.contiguous(), x, weight, cos, sin, ctx.eps), None, None, None, None


_rope.register_autograd(_rope_gradient, setup_context=_rope_setup)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + D/2}) of x (B, T, H, D) by angles of cos, sin (T, 1, D/2) or (B, T, 1, D/2).

    cos, sin get no gradient. Forward and backward 2 B T H D b bytes; floor of (4, 4096, 16, 128) in bf16: 0.031 ms.
    """
    return norm_rope(x, None, 0.0, cos, sin)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """rope(rms_norm(x, weight, eps), cos, sin) in one pass, weight (D,), not rounded in between; weight None: rope.

    D even and up to 256. Forward 2 B T H D b bytes, backward 3 B T H D b.
    """
    (B, T, _, D), given = x.shape, (x, cos, sin) if weight is None else (x, cos, sin, weight)
    fits = D % 2 == 0 and D <= 256 and cos.shape == sin.shape and cos.shape[-3:] == (T, 1, D // 2)
    fits = fits and cos.numel() in (T * D // 2, B * T * D // 2) and (weight is None or weight.shape == (D,))
    if not runs("norm_rope", *given, fits=fits):
        return norm_rope_ref(x, weight, eps, cos, sin)
    weight = None if weight is None else weight.contiguous()
    return _rope(x.contiguous(), weight, cos.contiguous(), sin.contiguous(), eps, 1.0)


# ---- SwiGLU ----------------------------------------------------------------------------------------------------------
def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@jit
def swiglu_kernel(G, U, Y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(G + at, at < N, 0.0).to(tl.float32), tl.load(U + at, at < N, 0.0).to(tl.float32)
    tl.store(Y + at, g * tl.sigmoid(g) * u, at < N)


@jit
def swiglu_backward_kernel(DY, G, U, DG, DU, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(G + at, at < N, 0.0).to(tl.float32), tl.load(U + at, at < N, 0.0).to(tl.float32)
    dy, sigmoid = tl.load(DY + at, at < N, 0.0).to(tl.float32), tl.sigmoid(g)
    tl.store(DG + at, dy * u * sigmoid * (1 + g * (1 - sigmoid)), at < N)
    tl.store(DU + at, dy * g * sigmoid, at < N)


@operator
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    swiglu_kernel[(triton.cdiv(y.numel(), 4096),)](gate, up, y, y.numel(), 4096, num_warps=8)
    return y


_swiglu.register_fake(lambda gate, up: torch.empty_like(gate))


@operator
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dg, du = torch.empty_like(gate), torch.empty_like(up)
    swiglu_backward_kernel[(triton.cdiv(dy.numel(), 4096),)](dy, gate, up, dg, du, dy.numel(), 4096, num_warps=8)
    return dg, du


_swiglu_backward.register_fake(lambda dy, gate, up: (torch.empty_like(gate), torch.empty_like(up)))
_swiglu.register_autograd(
    lambda ctx, dy: _swiglu_backward(dy.contiguous(), *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both of one shape: N values. Forward 3 N b bytes, backward 5 N b (silu is computed again)."""
    if not runs("swiglu", gate, up, fits=gate.shape == up.shape and gate.dtype == up.dtype):
        return swiglu_ref(gate, up)
    return _swiglu(gate.contiguous(), up.contiguous())


# ---- Attention: causal, within a window, within documents ------------------------------------------------------------
def flash_attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int = 0,
                        start: Tensor | None = None, scale: float | None = None) -> Tensor:  # fmt: skip
    T, S, mask = q.size(2), k.size(2), None
    if causal and (window or start is not None or T != S):
        t, s = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        mask = (s <= t) & (s > t - window) if window else s <= t  # (T, S)
        mask = mask if start is None else mask & (s >= start[:, None, :, None])  # (B, 1, T, S)
    options = dict(is_causal=causal and mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


@jit
def tile(X, strides, b, h, first, ROWS: tl.constexpr, D: tl.constexpr):
    """Pointers to the ROWS rows from `first` on of head h of X (B, heads, T, D)."""
    b, h, first = tl.cast(b, tl.int64), tl.cast(h, tl.int64), tl.cast(first, tl.int64)  # elements can be over 2^31
    X += b * strides[0] + h * strides[1] + first * strides[2]
    return X + tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, D)[None, :]


@jit
def keys_seen(t, b, START, T, W: tl.constexpr, CAUSAL: tl.constexpr):
    """The first and the last key that each query t sees; a query past the end sees what the last one does."""
    t = tl.minimum(t, T - 1)
    low = tl.maximum(t - (W - 1), 0) if W > 0 else t * 0
    if START is not None:
        low = tl.maximum(low, tl.load(START + b * T + t))
    return low, t if CAUSAL else t * 0 + (T - 1)


@jit
def attention_query_kernel(Q, K, V, START, LSE, OUT, DY, Y, DELTA, qs, ks, vs, ys, T, H, R, scale, W: tl.constexpr,
                           CAUSAL: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """OUT is y, or with DY dq: both are sums over the keys that a query sees."""
    # 1. M queries of head h, those with the longest rows first, so that no long one is left at the end
    blocks, bh, scale2 = tl.cdiv(T, M), tl.program_id(0) // tl.cdiv(T, M), scale * 1.4426950408889634  # log2(e)
    b, h, g, m = bh // H, bh % H, bh % H // R, (blocks - 1 - tl.program_id(0) % blocks) * M
    t = m + tl.arange(0, M)
    rows, real = bh * T + t, (t < T)[:, None]
    q, acc = tl.load(tile(Q, qs, b, h, m, M, D), real, 0.0), tl.zeros((M, D), tl.float32)
    # 2. some query sees keys from first to last; all see those from left to right, which need no mask
    low, high = keys_seen(t, b, START, T, W, CAUSAL)
    first, left, right, last = 0, 0, (m + 1 if CAUSAL else T) // N * N, tl.minimum(m + M, T) if CAUSAL else T
    if W > 0 or START is not None:
        first, left = tl.min(low) // N * N, tl.minimum(tl.cdiv(tl.max(low), N) * N, right)
    if DY is None:  # the largest score so far is finite also where nothing is seen yet: no inf - inf
        total, top = tl.zeros((M,), tl.float32), tl.full((M,), -1e30, tl.float32)
    else:  # a row's p sum to 1, so the gradients of its scores to 0, by delta = dy . y
        dy, y = tl.load(tile(DY, ys, b, h, m, M, D), real, 0.0), tl.load(tile(Y, ys, b, h, m, M, D), real, 0.0)
        lse, delta = tl.load(LSE + rows, t < T, 0.0), tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
        tl.store(DELTA + rows, delta, t < T)
    for n in range(first, last, N):
        s = n + tl.arange(0, N)
        here = (s < T)[:, None]
        k, v = tl.load(tile(K, ks, b, g, n, N, D), here, 0.0), tl.load(tile(V, vs, b, g, n, N, D), here, 0.0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, N)
        if (n < left) | (n + N > right):
            x = tl.where((low[:, None] <= s[None, :]) & (s[None, :] <= high[:, None]), x, float("-inf"))
        if DY is None:  # 3. y, with p relative to the largest score so far: a larger one rescales the sums
            new = tl.maximum(top, tl.max(x, axis=1) * scale2)
            p, keep = tl.exp2(x * scale2 - new[:, None]), tl.exp2(top - new)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
            total, top = total * keep + tl.sum(p, axis=1), new
        else:  # 4. dq = dx k with dx = p (dy v^T - delta)
            dx = tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None]
            dx *= tl.exp2(x * scale2 - lse[:, None])
            acc = tl.dot(dx.to(k.dtype), k, acc, input_precision="ieee")
    if DY is None:
        tl.store(LSE + rows, top + tl.log2(total), t < T)
    tl.store(tile(OUT, ys, b, h, m, M, D), acc / total[:, None] if DY is None else acc * scale, real)


@jit
def attention_key_kernel(Q, K, V, START, LSE, DK, DV, DY, DELTA, qs, ks, vs, ys, ds, T, G, R, scale, W: tl.constexpr,
                         CAUSAL: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # fmt: skip
    # 1. N keys and values of head g
    blocks, bg = tl.cdiv(T, N), tl.program_id(0) // tl.cdiv(T, N)
    b, g, n = bg // G, bg % G, tl.program_id(0) % blocks * N
    s, final, real = n + tl.arange(0, N), tl.minimum(n + N, T) - 1, (n + tl.arange(0, N) < T)[:, None]
    k, v = tl.load(tile(K, ks, b, g, n, N, D), real, 0.0), tl.load(tile(V, vs, b, g, n, N, D), real, 0.0)
    # 2. queries from first to last see some of these keys; those from left to right all of them
    first, left, right, last = n // M * M if CAUSAL else 0, final if CAUSAL else 0, T, T
    if W > 0:
        right, last = tl.minimum(n + W, T), tl.minimum(final + W, T)
    if START is not None:
        seen = n
        for i in range(n, T, 2048):
            t = i + tl.arange(0, 2048)
            start = tl.load(START + b * T + t, t < T, T)
            seen = tl.maximum(seen, tl.max(tl.where(start <= final, t + 1, 0)))
            right = tl.minimum(right, tl.min(tl.where(start <= n, T, t)))
        last = tl.minimum(last, seen)
    # 3. dk = dx^T q and dv = p^T dy, in one loop over the blocks of these queries in every head h of the group
    dk, dv, count = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32), tl.cdiv(last - first, M)
    for i in range(R * count):
        h, m = g * R + i // count, first + i % count * M
        t = m + tl.arange(0, M)
        rows, here = (b * G * R + h) * T + t, (t < T)[:, None]
        q, dy = tl.load(tile(Q, qs, b, h, m, M, D), here, 0.0), tl.load(tile(DY, ys, b, h, m, M, D), here, 0.0)
        dx = tl.dot(v, tl.trans(dy), input_precision="ieee")  # (N, M)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")
        if (m < left) | (m + M > right):
            low, high = keys_seen(t, b, START, T, W, CAUSAL)
            x = tl.where((low[None, :] <= s[:, None]) & (s[:, None] <= high[None, :]), x, float("-inf"))
        p = tl.exp2(x * (scale * 1.4426950408889634) - tl.load(LSE + rows, t < T, 0.0)[None, :])
        dx = p * (dx - tl.load(DELTA + rows, t < T, 0.0)[None, :])
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        dk = tl.dot(dx.to(q.dtype), q, dk, input_precision="ieee")
    tl.store(tile(DK, ds, b, g, n, N, D), dk * scale, real)
    tl.store(tile(DV, ds, b, g, n, N, D), dv, real)


def attention_blocks(x):
    """Queries, keys, warps and stages of one program: of y, of dq, of dk and dv."""
    small = (64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)
    large = (128, 64, 8 if x.size(3) > 64 else 4, 3), (128, 64, 8, 3), (64, 128, 8, 3)
    blocks = small if INTERPRETED or x.element_size() == 4 else large
    return (dict(zip(("M", "N", "num_warps", "num_stages"), block)) for block in blocks)


def new_heads(x: Tensor) -> Tensor:
    """A new tensor of the shape of x (B, heads, T, D), in the memory order (B, T, heads, D)."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


@operator
def _flash_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, causal: bool, window: int,
                     scale: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, H, T, D), (blocks, _, _), y = q.shape, attention_blocks(q), new_heads(q)
    lse, grid = q.new_empty(B, H, T, dtype=torch.float32), (triton.cdiv(T, blocks["M"]) * B * H,)
    sizes = (*(x.stride() for x in (q, k, v, y)), T, H, H // k.size(1), scale, window, causal, D)
    attention_query_kernel[grid](q, k, v, start, lse, y, None, None, None, *sizes, **blocks)
    return y, lse


@operator
def _flash_attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, y: Tensor, lse: Tensor,
                              causal: bool, window: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (B, H, T, D), G, (_, one, two) = q.shape, k.size(1), attention_blocks(q)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2)  # as y
    dq, dk, dv, delta = new_heads(q), new_heads(k), new_heads(v), torch.empty_like(lse)
    strides, rest = (q.stride(), k.stride(), v.stride(), y.stride()), (H // G, scale, window, causal, D)
    grid, grid2 = (triton.cdiv(T, one["M"]) * B * H,), (triton.cdiv(T, two["N"]) * B * G,)
    attention_query_kernel[grid](q, k, v, start, lse, dq, dy, y, delta, *strides, T, H, *rest, **one)  # and delta
    attention_key_kernel[grid2](q, k, v, start, lse, dk, dv, dy, delta, *strides, dk.stride(), T, G, *rest, **two)
    return dq, dk, dv


_flash_attention.register_fake(lambda q, *_: (new_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
_flash_attention_backward.register_fake(lambda dy, q, k, v, *_: (new_heads(q), new_heads(k), new_heads(v)))


def _flash_attention_setup(ctx, inputs, output):
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4], *output)


def _flash_attention_gradient(ctx, dy, _):
    return *_flash_attention_backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None


_flash_attention.register_autograd(_flash_attention_gradient, setup_context=_flash_attention_setup)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int = 0,
                    start: Tensor | None = None, scale: float | None = None) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v without a (T, T) matrix in memory (FlashAttention-2, https://arxiv.org/abs/2307.08691).

    q (B, H, T, D), k and v (B, G, T, D) of any strides -> (B, H, T, D) in the memory order (B, T, H, D); H // G query
    heads share a key/value head; scale > 0 is 1 / sqrt(D) if None. Causal: query t sees the keys s <= t; of these, a
    window W > 0 leaves the last W, and start (B, T), where the document of each token begins, those from start[t] on.
    ValueError for either without causal. With P pairs seen, T (T + 1) / 2 or W T - W (W - 1) / 2, forward 4 B H D P
    FLOPs, backward 14, not 10: scores are computed twice there, so that no sum has an order left to chance.
    Floor of B 4, H 16, T 4096, D 128, causal, at 790 TFLOP/s: 0.35 and 1.22 ms.
    """
    if (window or start is not None) and not causal:
        raise ValueError(f"window={window} or start without causal=True: only a causal query has a first key")
    B, H, T, D = q.shape
    fits = k.shape == v.shape == (B, k.size(1), T, D) and H % k.size(1) == 0 and D in (16, 32, 64, 128)
    fits = fits and q.dtype == k.dtype == v.dtype and (start is None or start.shape == (B, T))
    if not runs("flash_attention", q, k, v, fits=fits):
        return flash_attention_ref(q, k, v, causal, window, start, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    start = None if start is None else start.int().contiguous()
    window, scale = window if window < T else 0, D**-0.5 if scale is None else scale
    return _flash_attention(q, k, v, start, causal, window, scale)[0]


# ---- Linear layer and cross-entropy, a chunk of tokens at a time -----------------------------------------------------
def linear_cross_entropy_ref(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), targets, ignore_index=-1)


@jit
def cross_entropy_kernel(LOGITS, TARGETS, LOSS, V: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    LOGITS += row.to(tl.int64) * V
    target = tl.load(TARGETS + row)
    # A target that is no token reads nothing and makes the loss NaN. Read before the logits are overwritten.
    wanted = tl.load(LOGITS + target, (target >= 0) & (target < V), float("nan")).to(tl.float32)
    # 1. log of the sum of exp, relative to the greatest logit so far
    top, total = float("-inf"), tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, V, BLOCK, num_stages=3):
        x = tl.load(LOGITS + first + cols, first + cols < V, float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new) + tl.exp(x - new)
        top = new
    total = tl.sum(total, axis=0)
    tl.store(LOSS + row, tl.where(target == -1, 0.0, tl.log(total) + (top - wanted)))
    # 2. softmax - onehot over the logits
    if GRAD:
        for first in tl.range(0, V, BLOCK, num_stages=3):
            x = tl.load(LOGITS + first + cols, first + cols < V, 0.0).to(tl.float32)
            dx = tl.exp(x - top) * (1.0 / total) - tl.where(first + cols == target, 1.0, 0.0)
            tl.store(LOGITS + first + cols, tl.where(target == -1, 0.0, dx), first + cols < V)


def _add_product(sums, a, b):
    """sums += a @ b, all in fp32 but for the operands."""
    if a.is_cuda:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(a.float(), b.float())


@operator
def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int,
                          grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    N, V = len(x), len(weight)
    losses, count = x.new_empty(N, dtype=torch.float32), (targets != -1).sum()
    dx, dw = (torch.zeros_like(z if grad else z[:0], dtype=torch.float32) for z in (x, weight))
    buffer = x.new_empty(min(chunk, N), V)
    for i in range(0, N, chunk):
        tokens = x[i : i + chunk]  # (n, C)
        logits = torch.mm(tokens, weight.T, out=buffer[: len(tokens)])  # (n, V), then their gradient
        cross_entropy_kernel[(len(tokens),)](logits, targets[i:], losses[i:], V, grad, 8192, num_warps=16)
        if grad:
            _add_product(dx[i : i + chunk], logits, weight)
            _add_product(dw, logits.T, tokens)
    return losses.sum() / count, dx, dw, 1 / count.clamp(min=1).float()


@_linear_cross_entropy.register_fake
def _(x, weight, targets, chunk, grad):
    dx, dw = (torch.empty_like(z if grad else z[:0], dtype=torch.float32) for z in (x, weight))
    return x.new_empty((), dtype=torch.float32), dx, dw, x.new_empty((), dtype=torch.float32)


def _linear_cross_entropy_setup(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)  # zeros for the unused outputs would be as large as the weight
    ctx.save_for_backward(*output[1:])


def _linear_cross_entropy_gradient(ctx, dloss, *_):
    dx, dw, scale = ctx.saved_tensors
    scale = scale * dloss  # here and not in the chunks, where 1 / count would underflow in fp16
    dx, dw = (torch.mul(z, scale, out=torch.empty_like(z, dtype=ctx.dtype)) for z in (dx, dw))
    return dx, dw, None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_gradient, setup_context=_linear_cross_entropy_setup)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2048) -> Tensor:
    """The mean cross-entropy, in fp32, of the logits x @ weight.T against targets (N,), of which -1 are ignored.

    x (N, C), weight (V, C). Logits exist for `chunk` tokens at a time: 2048 * 151,936 * 2 bytes = 0.62 GB for Qwen3.
    The gradients are made along with the loss and kept in fp32: 6 N C V FLOPs and 12 N V b bytes in all. A target
    outside [0, V) makes the loss NaN.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight, grad = weight.to(x.dtype), torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not runs("linear_cross_entropy", x, weight):
        return linear_cross_entropy_ref(x, weight, targets)
    return _linear_cross_entropy(x.contiguous(), weight.contiguous(), targets.contiguous(), chunk, grad)[0]


# ---- Mixture of experts ----------------------------------------------------------------------------------------------
def moe_plan(experts: Tensor, E: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """experts (N, K) -> the choices sorted by expert (N K,), where each expert's begin in that order (E + 1,), and its
    tiles of b rows (n, 2): expert, first row. n is the most there can be; first rows of what is too much are past N K.
    """
    expert, order = experts.flatten().int().sort(stable=True)  # choice n K + k is token n's k-th
    edge = torch.searchsorted(expert, torch.arange(E + 1, device=expert.device, dtype=torch.int32))
    tiles = (edge.diff() + b - 1) // b  # (E,)
    tile = torch.arange(min(len(expert), E + (len(expert) - E) // b), device=expert.device)
    e = torch.searchsorted(tiles.cumsum(0), tile, right=True).clamp(max=E - 1)
    return order, edge, torch.stack((e, edge[e] + (tile - (tiles.cumsum(0) - tiles)[e]) * b), dim=1)


def moe_ref(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    (N, K), (E, C, _) = experts.shape, w_gate.shape
    b = max(1, -(-N * K // E))  # the mean load: 2 E tiles at most
    order, edge, tiles = moe_plan(experts, E, b)
    e, rows = tiles[:, 0], tiles[:, 1:] + torch.arange(b, device=x.device)  # (n,), (n, b)
    choice = torch.where(rows < edge[e + 1][:, None], order[rows.clamp(max=N * K - 1)], N * K)  # (n, b); N K: padding
    padded = torch.cat((x, x.new_zeros(1, C)))[choice // K]  # (n, b, C)
    w_gate, w_up, w_down = (w.to(x.dtype).index_select(0, e) for w in (w_gate, w_up, w_down))
    h = (F.silu(padded @ w_gate) * (padded @ w_up)) @ w_down  # (n, b, C)
    h = h.new_zeros(N * K + 1, C).index_copy(0, choice.flatten(), h.flatten(0, 1))[:-1]
    return (h.view(N, K, C) * gates.to(x.dtype)[..., None]).sum(dim=1)


@jit
def moe_kernel(A, W, ORDER, EDGE, TILES, NK, K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SD: tl.constexpr,
               SW: tl.constexpr, GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, A2=None,
               W2=None, OUT=None, G=None, U=None, H=None, GATES=None, DG=None, DU=None, DGATES=None):  # fmt: skip
    """Rows (D) times their expert's W (D, WIDTH), of strides SD and SW; a program has a tile of rows and BN columns.

    GATHER, from tokens to sorted rows: g = x W, u = x W2, h = gate silu(g) u; backward from dh = gate dy W to dg, du.
    Otherwise from sorted rows to a row of OUT for each choice: h W; backward dg W + du W2.
    """
    # 1. rows and columns; programs of neighbouring columns come one after the other and share their rows in the cache
    blocks: tl.constexpr = (WIDTH + BN - 1) // BN
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    e, first = tl.load(TILES + 2 * tile).to(tl.int64), tl.load(TILES + 2 * tile + 1)
    end = tl.load(EDGE + e + 1)
    if first >= end:
        return
    rows, cols, ks = first + tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside, within = rows < end, cols < WIDTH
    choice = tl.load(ORDER + rows, inside, 0)
    source = (choice // K if GATHER else rows).to(tl.int64)
    a, w = source[:, None] * D + ks[None, :], e * D * WIDTH + ks[:, None] * SD + cols[None, :] * SW
    # 2. products
    acc, acc2 = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        a_mask, w_mask = inside[:, None] & (k + ks < D)[None, :], (k + ks < D)[:, None] & within[None, :]
        x = tl.load(A + a + k, a_mask, 0.0)
        acc = tl.dot(x, tl.load(W + w + k * SD, w_mask, 0.0), acc, input_precision="ieee")
        if W2 is not None:
            x2 = x if GATHER else tl.load(A2 + a + k, a_mask, 0.0)
            acc2 = tl.dot(x2, tl.load(W2 + w + k * SD, w_mask, 0.0), acc2, input_precision="ieee")
    # 3. results
    at, mask = rows.to(tl.int64)[:, None] * WIDTH + cols[None, :], inside[:, None] & within[None, :]
    if not GATHER:
        tl.store(OUT + choice.to(tl.int64)[:, None] * WIDTH + cols[None, :], acc if W2 is None else acc + acc2, mask)
    elif H is not None:
        gate = tl.load(GATES + choice, inside, 0.0).to(tl.float32)[:, None]
        tl.store(G + at, acc, mask)
        tl.store(U + at, acc2, mask)
        tl.store(H + at, gate * acc * tl.sigmoid(acc) * acc2, mask)
    else:  # h is kept, not written here again: that would spill registers
        g, u = tl.load(G + at, mask, 0.0).to(tl.float32), tl.load(U + at, mask, 0.0).to(tl.float32)
        gate, s = tl.load(GATES + choice, inside, 0.0).to(tl.float32)[:, None], tl.sigmoid(g)
        tl.store(DGATES + block * NK + choice, tl.sum(acc * g * s * u, axis=1), inside)  # of these columns
        tl.store(DU + at, gate * acc * g * s, mask)
        tl.store(DG + at, gate * acc * u * s * (1 + g * (1 - s)), mask)


@jit
def moe_weight_kernel(A, B, DW, ORDER, EDGE, K: tl.constexpr, C: tl.constexpr, I: tl.constexpr, SC: tl.constexpr,
                      SI: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """dW[e] = sum over expert e's rows of (their tokens' A)^T (C, rows) B (rows, I), stored with strides SC and SI."""
    blocks: tl.constexpr = (I + BN - 1) // BN
    programs: tl.constexpr = (C + BM - 1) // BM * blocks  # of an expert
    e, block = tl.program_id(0) // programs, tl.program_id(0) % programs
    c, i = block // blocks * BM + tl.arange(0, BM), block % blocks * BN + tl.arange(0, BN)
    acc, end = tl.zeros((BM, BN), tl.float32), tl.load(EDGE + e + 1)
    for first in range(tl.load(EDGE + e), end, BK):
        rows = first + tl.arange(0, BK)
        token, inside = (tl.load(ORDER + rows, rows < end, 0) // K).to(tl.int64), (rows < end)[:, None]
        a = tl.load(A + token[:, None] * C + c[None, :], inside & (c < C)[None, :], 0.0)
        b = tl.load(B + rows.to(tl.int64)[:, None] * I + i[None, :], inside & (i < I)[None, :], 0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = e.to(tl.int64) * C * I + c[:, None] * SC + i[None, :] * SI
    tl.store(DW + at, acc, (c < C)[:, None] & (i < I)[None, :])


def moe_sizes(x):
    """Blocks that fit into 227 KB and the registers, and wider ones for one weight and little else to hold."""
    BM, BN, BK = (32, 32, 32) if INTERPRETED else (128, 128, 64) if x.element_size() == 2 else (128, 64, 32)
    sizes = dict(BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3)
    return sizes, sizes | dict(BN=2 * BN)


@operator
def _moe(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, gates: Tensor, order: Tensor, edge: Tensor, tiles: Tensor
) -> tuple[Tensor, Tensor]:
    (N, K), (_, C, I), (sizes, wider) = gates.shape, w_gate.shape, moe_sizes(x)
    kept, out, plan = x.new_empty(3, N * K, I), x.new_empty(N * K, C), (order, edge, tiles, N * K, K)
    (g, u, h), grid = kept, (len(tiles) * triton.cdiv(I, sizes["BN"]),)
    moe_kernel[grid](x, w_gate, *plan, C, I, I, 1, True, W2=w_up, G=g, U=u, H=h, GATES=gates, **sizes)
    grid = (len(tiles) * triton.cdiv(C, wider["BN"]),)
    moe_kernel[grid](h, w_down, *plan, I, C, C, 1, False, OUT=out, **wider)
    return out.view(N, K, C).sum(dim=1), kept  # the gates are in h


_moe.register_fake(lambda x, w, _u, _d, gates, *_: (torch.empty_like(x), x.new_empty(3, gates.numel(), w.size(2))))


@operator
def _moe_backward(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, gates: Tensor, order: Tensor, edge: Tensor,
    tiles: Tensor, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (N, K), (E, C, I), (sizes, wider), (g, u, h) = gates.shape, w_gate.shape, moe_sizes(x), kept
    dg, du, dw_gate, dw_up, dw_down = (torch.empty_like(t) for t in (g, u, w_gate, w_up, w_down))
    out, blocks, plan = x.new_empty(N * K, C), triton.cdiv(I, sizes["BN"]), (order, edge, tiles, N * K, K)
    dgates, grid = x.new_empty(blocks, N, K, dtype=torch.float32), (len(tiles) * blocks,)
    moe_kernel[grid](dy, w_down, *plan, C, I, 1, C, True, G=g, U=u, GATES=gates, DG=dg, DU=du, DGATES=dgates, **sizes)
    grid = (len(tiles) * triton.cdiv(C, sizes["BN"]),)
    moe_kernel[grid](dg, w_gate, *plan, I, C, 1, I, False, A2=du, W2=w_up, OUT=out, **sizes)
    wider["num_stages"] = 5  # of which two wait for ORDER
    grid = (E * triton.cdiv(C, wider["BM"]) * triton.cdiv(I, wider["BN"]),)
    for a, b, dw, strides in ((x, dg, dw_gate, (I, 1)), (x, du, dw_up, (I, 1)), (dy, h, dw_down, (1, C))):
        moe_weight_kernel[grid](a, b, dw, order, edge, K, C, I, *strides, **wider)
    return out.view(N, K, C).sum(dim=1), dw_gate, dw_up, dw_down, dgates.sum(dim=0).to(gates.dtype)


_moe_backward.register_fake(lambda dy, *saved: tuple(torch.empty_like(t) for t in saved[:5]))


def _moe_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of what is kept: zeros as large as it is
    ctx.save_for_backward(*inputs, output[1])


def _moe_gradient(ctx, dy, _):
    return *_moe_backward(dy.contiguous(), *ctx.saved_tensors), None, None, None


_moe.register_autograd(_moe_gradient, setup_context=_moe_setup)


def moe(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    """y_n = sum over k of gates[n, k] silu(x_n w_gate[e]) * (x_n w_up[e]) w_down[e], e = experts[n, k]; never waits.

    x (N, C), w_gate and w_up (E, C, I), w_down (E, I, C), all cast to x's type; experts (N, K) int64, gates (N, K), 0
    for a dropped choice -> (N, C). Forward 6 N K C I FLOPs, backward 12 N K C I; floor of N = 32,768, E = 128,
    C = 2048, I = 768, K = 8 in bf16: 3.1 and 6.3 ms. Kept for backward: x, cast weights, and 3 N K I b bytes.
    """
    if not runs("moe", x, w_gate, w_up, w_down, gates):
        return moe_ref(x, w_gate, w_up, w_down, experts, gates)
    weights = (w.to(x.dtype).contiguous() for w in (w_gate, w_up, w_down))
    plan = (t.int() for t in moe_plan(experts, len(w_gate), moe_sizes(x)[0]["BM"]))
    return _moe(x.contiguous(), *weights, gates.contiguous(), *plan)[0]


# ---- Into a model ----------------------------------------------------------------------------------------------------
# Methods that take the place of a module's own. Bound as methods, they follow the module into its deep copies.
def _norm(self, x):
    return rms_norm(x, 1 + self.weight if self.stored_less_one else self.weight, self.eps)


def _norm_later(self, x):  # together with the rotation that follows
    return x, 1 + self.weight if self.stored_less_one else self.weight, self.eps


def _apply_rope(x, cos, sin):
    return norm_rope(*x, cos, sin) if isinstance(x, tuple) else rope(x, cos, sin)


def _mlp(self, x):
    return self.w_down(swiglu(self.w_gate(x), self.w_up(x)))


def _mixture(self, x, experts, gates, chosen):
    kind = x.device.type
    rows = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    weights = (w.weight for w in (self.w_gate, self.w_up, self.w_down))
    return moe(rows.flatten(0, 1), *weights, experts.flatten(0, 1), gates.flatten(0, 1)).view_as(rows)


def _positions_and_start(self, idx, cache):
    """Instead of a mask (B, 1, T, T) where each token's document begins (B, T), in int32, which tells as much."""
    if cache is not None or self.config.eot_id < 0 or idx.size(1) > self.config.block_size:
        return type(self).positions_and_mask(self, idx, cache)
    t = torch.arange(idx.size(1), device=idx.device)
    start = torch.where(idx == self.config.eot_id, t, 0).cummax(dim=1).values
    return t - start, start.int()


def _attention(q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False):
    if mask is not None and mask.dtype == torch.int32:
        return flash_attention(q, k, v, start=mask, scale=scale)
    if is_causal and q.size(2) == k.size(2):
        return flash_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


def _lm_loss(self, x, targets):
    head = getattr(self, "lm_head", None) or self.embed
    return linear_cross_entropy(x.flatten(0, 1), head.weight, targets.flatten())


def _with_names(method, **names):
    """The same method, to whose code these global names mean something else."""
    scope = method.__globals__ | names
    del scope["__name__"]  # else torch.compile looks the names up in the module of that name
    return FunctionType(method.__code__, scope, method.__name__, method.__defaults__)


def install(model: torch.nn.Module) -> dict[str, int]:
    """Puts the kernels into a model of this project, in place, and returns how many of what: {"rms_norm": 9, ...}.

    Parts are known by the names that the model files share; what has no kernel stays as it is. Parameters and their
    names are untouched, results differ by rounding. To be done before torch.compile; `uninstall` undoes it.
    """
    if any("swapped" in vars(module) for module in model.modules()):
        raise ValueError("the kernels are installed already: uninstall(model) first")
    swapped, config = Counter(), model.config

    def swap(module, method, name="forward"):
        setattr(module, name, MethodType(method, module))
        vars(module).setdefault("swapped", []).append(name)

    def swap_norm(module, method):
        n = module.weight.numel()
        module.stored_less_one = functional_call(module, {"weight": torch.zeros(n)}, torch.ones(n)).any().item()
        swap(module, method)

    for module in model.modules():
        kind, forward = type(module).__name__, type(module).forward
        if kind == "Attention":
            used, names = forward.__code__.co_names, {}
            if "F" in used:
                names["F"] = SimpleNamespace(scaled_dot_product_attention=_attention)
                swapped["flash_attention"] += 1
            if "apply_rope" in used and getattr(config, "rotary_fraction", 1.0) == 1.0:
                names["apply_rope"] = _apply_rope
                norms = [n for n in (module.q_norm, getattr(module, "k_norm", None)) if type(n).__name__ == "RMSNorm"]
                fused = len(norms) == 2 and not any(getattr(module, "gates", ()))
                for norm in norms if fused else ():
                    swap_norm(norm, _norm_later)
                swapped["norm_rope" if fused else "rope"] += 2
            swap(module, _with_names(forward, **names))
        elif kind == "RMSNorm" and "swapped" not in vars(module):
            swap_norm(module, _norm)
            swapped["rms_norm"] += 1
        elif kind == "MLP" and hasattr(module, "w_gate"):
            swap(module, _mlp)
            swapped["swiglu"] += 1
        elif kind == "MoE":
            swap(module, _mixture, "mixture")
            swapped["moe"] += 1
        elif kind == "GatedDelta":
            from kernels_delta import gated_delta_rule  # which needs this file

            swap(module, _with_names(forward, chunked_delta_rule=gated_delta_rule))
            swapped["gated_delta_rule"] += 1
    if swapped["flash_attention"]:
        swap(model, _positions_and_start, "positions_and_mask")
    if not getattr(config, "logit_softcap", 0.0):
        swap(model, _lm_loss, "lm_loss")
        swapped["linear_cross_entropy"] += 1
    return dict(swapped)


def uninstall(model: torch.nn.Module) -> None:
    """Gives every part of the model its own methods again."""
    for module in model.modules():
        for name in vars(module).pop("swapped", ()):
            delattr(module, name)
