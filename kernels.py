"""Triton kernels for training, each below its plain PyTorch twin.

    kernels.install(model)      lets kernels take over the methods of a model that compute the same
    kernels.uninstall(model)    gives the model its own methods back

Every operation is a function `name` with a twin `name_ref`, the same in PyTorch: its definition, what tests hold it
against, and what runs instead on other devices and for other shapes, which is said once. Kernels run in fp32, fp16 and
bf16 on GPUs since the H100.

A section has the twin, the kernels, their launches as custom operators (for torch.compile opaque calls with known
shapes), the gradient, and last the function to call. A "floor" is the least time at 4.3 TB/s or 790 TFLOP/s, which one
H200 reaches. The gated delta rule is in kernels_delta.py.

N  rows, or the tokens of all sequences
C  numbers in a row
b  bytes of a number
B  batch
T  time
S  time of the keys
H  query heads
G  key/value heads
D  head_dim
V  vocabulary
E  experts
K  experts per token
I  width of an expert
"""

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.library import custom_op
from torch.utils._pytree import tree_leaves

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # every function is its twin
    triton = None
    tl = SimpleNamespace(constexpr=None)

    def jit(kernel):
        return kernel


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU as Python: for tests
DTYPES = (torch.float32, torch.float16)
if not INTERPRETED:  # Triton's interpreter gets bf16 wrong without a word
    DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARED = 227 * 1024  # bytes of shared memory that a program can have on an H100 and on an H200
PROGRAMS = 4 * 132  # programs of a kernel that loops over rows: 4 for each of their 132 multiprocessors
TWINS_ONLY = False  # True while install compares a model's methods with the twins
SAID = set()  # (kernel, why it did not run)


def operator(function):
    """Makes a custom operator of a function, whose tensors must be contiguous and whose results must be new."""

    @functools.wraps(function)
    def on_its_device(x, *rest):
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
            return function(x, *rest)

    name = function.__name__.strip("_")
    return custom_op(f"nanollm::{name}", on_its_device, mutates_args=())


@torch.compiler.assume_constant_result  # else the print would break torch.compile's graph
def refuse(name, reason):
    if (name, reason) not in SAID:
        SAID.add((name, reason))
        print(f"kernels.{name}: {reason}: PyTorch instead", file=sys.stderr)
    return False


def runs(name: str, *tensors: Tensor, fits: bool = True) -> bool:
    """Returns whether the kernel can take these tensors; if not, why is printed once. fits: its own conditions hold."""
    if TWINS_ONLY:
        return False
    if triton is None:
        return refuse(name, "Triton is not installed")
    device = tensors[0].device
    wanted = "cpu" if INTERPRETED else "cuda"
    if device.type != wanted:
        return refuse(name, f"no kernel for device {device.type}")
    if device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < SHARED:
        return refuse(name, "this GPU has less shared memory than an H100, for which the blocks are chosen")
    for x in tensors:
        if x.dtype not in DTYPES:
            return refuse(name, f"no kernel for {x.dtype}")
    if not fits:
        return refuse(name, "no kernel for these shapes or this mix of dtypes")
    return True


# ---- RMSNorm, alone or after the residual sum ------------------------------------------------------------------------


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(wide), x.shape[-1:], eps=eps) * weight  # rounded once, at the end
    return y.to(x.dtype)


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


def _rms_norm_results(x, residual):
    """Returns new tensors for y and the sum h, which is empty without a residual, both as x, and 1 / rms (N,)."""
    y = torch.empty_like(x)
    h = x.new_empty(0)
    if residual is not None:
        h = torch.empty_like(x)
    rstd = x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)
    return y, h, rstd


@operator
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = _rms_norm_results(x, residual)
    N = len(rstd)
    C = x.size(-1)
    BLOCK = triton.next_power_of_2(C)
    ROWS = max(1, 4096 // BLOCK)
    programs = triton.cdiv(N, ROWS)
    rms_norm_kernel[(programs,)](x, residual, weight, y, h, rstd, N, C, eps, ROWS, BLOCK, num_warps=4)
    return y, h, rstd


_rms_norm.register_fake(lambda x, residual, weight, eps: _rms_norm_results(x, residual))


@operator
def _rms_norm_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    N = len(rstd)
    C = h.size(-1)
    BLOCK = triton.next_power_of_2(C)
    ROWS = max(1, 4096 // BLOCK)
    warps = 4 if BLOCK <= 4096 else 8
    programs = min(triton.cdiv(N, ROWS), PROGRAMS)
    dx = torch.empty_like(h)
    dw = h.new_empty(programs, C, dtype=torch.float32)  # a row for each program, added up in a fixed order
    rms_norm_backward_kernel[(programs,)](dy, dh, h, weight, rstd, dx, dw, N, C, ROWS, BLOCK, num_warps=warps)
    return dx, dw.sum(dim=0).to(weight.dtype)


_rms_norm_backward.register_fake(lambda dy, dh, h, weight, _: (torch.empty_like(h), torch.empty_like(weight)))


def _rms_norm_setup(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, h, rstd = output
    ctx.add = residual is not None
    if not ctx.add:
        h = x
    ctx.save_for_backward(h, weight, rstd)


def _rms_norm_gradient(ctx, dy, dh, _):
    h, weight, rstd = ctx.saved_tensors
    if not ctx.add:
        dx, dw = _rms_norm_backward(dy.contiguous(), None, h, weight, rstd)
        return dx, None, dw, None
    dx, dw = _rms_norm_backward(dy.contiguous(), dh.contiguous(), h, weight, rstd)
    return dx, dx, dw, None


_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_rms_norm_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dimension, in fp32 inside: x (..., C), weight (C,); C up to 8192.

    Forward 2 N C b bytes, backward 3 N C b; floor of N = 131,072, C = 1024 in bf16 at 4.3 TB/s: 0.125 and 0.187 ms.
    """
    fits = weight.shape == x.shape[-1:] and len(weight) <= 8192
    if not runs("rms_norm", x, weight, fits=fits):
        return rms_norm_ref(x, weight, eps)
    return _rms_norm(x.contiguous(), None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns rms_norm(h) and h = x + residual, both (..., C), in one pass. Forward and backward 4 N C b bytes."""
    fits = x.shape == residual.shape and x.dtype == residual.dtype
    fits = fits and weight.shape == x.shape[-1:] and len(weight) <= 8192
    if not runs("add_rms_norm", x, residual, weight, fits=fits):
        return add_rms_norm_ref(x, residual, weight, eps)
    y, h, _ = _rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
    return y, h


# ---- RoPE, alone or after an RMSNorm of each head --------------------------------------------------------------------


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def norm_rope_ref(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    if weight is not None:
        x = rms_norm_ref(x, weight, eps)
    return rope_ref(x, cos, sin)


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
    N = x.numel() // D
    BLOCK = triton.next_power_of_2(D // 2)
    ROWS = 2048 // BLOCK
    programs = triton.cdiv(N, ROWS)
    angles = cos.numel() // (D // 2)
    norm = weight is not None
    y = torch.empty_like(x)
    rope_kernel[(programs,)](x, weight, cos, sin, y, N, angles, eps, sign, H, D, norm, ROWS, BLOCK)
    return y


_rope.register_fake(lambda x, *_: torch.empty_like(x))


@operator
def _norm_rope_backward(dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor,
                        eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, D = x.shape[-2:]
    N = x.numel() // D
    BLOCK = triton.next_power_of_2(D // 2)
    ROWS = 1024 // BLOCK
    programs = min(triton.cdiv(N, ROWS), PROGRAMS)
    angles = cos.numel() // (D // 2)
    dx = torch.empty_like(x)
    dw = x.new_empty(programs, D, dtype=torch.float32)
    norm_rope_backward_kernel[(programs,)](dy, x, weight, cos, sin, dx, dw, N, angles, eps, H, D, ROWS, BLOCK)
    return dx, dw.sum(dim=0).to(weight.dtype)


_norm_rope_backward.register_fake(lambda dy, x, weight, *_: (torch.empty_like(x), torch.empty_like(weight)))


def _rope_setup(ctx, inputs, output):
    x, weight, cos, sin, ctx.eps, ctx.sign = inputs
    if weight is None:
        x = None  # a rotation's gradient needs only the angles
    ctx.save_for_backward(x, weight, cos, sin)


def _rope_gradient(ctx, dy):
    x, weight, cos, sin = ctx.saved_tensors
    if weight is None:
        dx = _rope(dy.contiguous(), None, cos, sin, 0.0, -ctx.sign)
        return dx, None, None, None, None, None
    dx, dw = _norm_rope_backward(dy.contiguous(), x, weight, cos, sin, ctx.eps)
    return dx, dw, None, None, None, None


_rope.register_autograd(_rope_gradient, setup_context=_rope_setup)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + D/2}) of x (B, T, H, D) by angles of cos, sin (T, 1, D/2) or (B, T, 1, D/2).

    cos, sin get no gradient. Forward and backward 2 B T H D b bytes; floor of (4, 4096, 16, 128) in bf16: 0.031 ms.
    """
    return norm_rope(x, None, 0.0, cos, sin)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns rope(rms_norm(x, weight, eps), cos, sin) from one pass, without rounding in between; weight None: rope.

    weight (D,), D even and up to 256. Forward 2 B T H D b bytes, backward 3 B T H D b.
    """
    B, T, _, D = x.shape
    given = [x, cos, sin]
    fits = D % 2 == 0 and D <= 256 and cos.shape == sin.shape and cos.shape[-3:] == (T, 1, D // 2)
    fits = fits and cos.numel() in (T * D // 2, B * T * D // 2)
    if weight is not None:
        given.append(weight)
        fits = fits and weight.shape == (D,)
    if not runs("norm_rope", *given, fits=fits):
        return norm_rope_ref(x, weight, eps, cos, sin)
    if weight is not None:
        weight = weight.contiguous()
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
    N = y.numel()
    programs = triton.cdiv(N, 4096)
    swiglu_kernel[(programs,)](gate, up, y, N, 4096, num_warps=8)
    return y


_swiglu.register_fake(lambda gate, up: torch.empty_like(gate))


@operator
def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dg = torch.empty_like(gate)
    du = torch.empty_like(up)
    N = dy.numel()
    programs = triton.cdiv(N, 4096)
    swiglu_backward_kernel[(programs,)](dy, gate, up, dg, du, N, 4096, num_warps=8)
    return dg, du


_swiglu_backward.register_fake(lambda dy, gate, up: (torch.empty_like(gate), torch.empty_like(up)))


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx, dy):
    gate, up = ctx.saved_tensors
    return _swiglu_backward(dy.contiguous(), gate, up)


_swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, both of one shape, N values. Forward 3 N b bytes, backward 5 N b (silu again)."""
    fits = gate.shape == up.shape and gate.dtype == up.dtype
    if not runs("swiglu", gate, up, fits=fits):
        return swiglu_ref(gate, up)
    return _swiglu(gate.contiguous(), up.contiguous())


# ---- Attention: causal, within a window, within documents ------------------------------------------------------------


def flash_attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int = 0,
                        start: Tensor | None = None, scale: float | None = None) -> Tensor:  # fmt: skip
    T = q.size(2)
    S = k.size(2)
    mask = None
    if causal and (window > 0 or start is not None or T != S):
        t = torch.arange(S - T, S, device=q.device)[:, None]  # (T, 1): queries are the last tokens
        s = torch.arange(S, device=q.device)
        mask = s <= t  # (T, S)
        if window > 0:
            mask = mask & (s > t - window)
        if start is not None:
            mask = mask & (s >= start[:, None, :, None])  # (B, 1, T, S)
        causal = False
    gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa)


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
    """Returns the launch options of three programs, for y, for dq, for dk and dv: M queries and N keys at a time."""
    rows = [(128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)]
    if INTERPRETED or x.element_size() == 4:
        rows = [(64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)]
    elif x.size(3) <= 64:
        rows[0] = (128, 64, 4, 3)
    names = ("M", "N", "num_warps", "num_stages")
    return [dict(zip(names, row)) for row in rows]


def new_heads(x: Tensor) -> Tensor:
    """Returns a new tensor of the shape of x (B, heads, T, D), in the memory order (B, T, heads, D)."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _flash_attention_results(q):
    """Returns new tensors for y, as q (B, H, T, D), and for the log2 of each row's sum of exp2 (B, H, T)."""
    return new_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator
def _flash_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, causal: bool, window: int,
                     scale: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, T, D = q.shape
    R = H // k.size(1)  # query heads to a key head
    y, lse = _flash_attention_results(q)
    blocks = attention_blocks(q)[0]
    grid = (triton.cdiv(T, blocks["M"]) * B * H,)
    strides = [x.stride() for x in (q, k, v, y)]
    sizes = (T, H, R, scale, window, causal, D)
    attention_query_kernel[grid](q, k, v, start, lse, y, None, None, None, *strides, *sizes, **blocks)
    return y, lse


_flash_attention.register_fake(lambda q, *_: _flash_attention_results(q))


@operator
def _flash_attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, y: Tensor, lse: Tensor,
                              causal: bool, window: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, T, D = q.shape
    G = k.size(1)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2)  # in the memory order of y, whose strides it shares
    dq = new_heads(q)
    dk = new_heads(k)
    dv = new_heads(v)
    delta = torch.empty_like(lse)
    _, blocks, key_blocks = attention_blocks(q)
    strides = [x.stride() for x in (q, k, v, y)]
    sizes = (H // G, scale, window, causal, D)
    # 1. dq, and delta, which the second kernel reads
    grid = (triton.cdiv(T, blocks["M"]) * B * H,)
    attention_query_kernel[grid](q, k, v, start, lse, dq, dy, y, delta, *strides, T, H, *sizes, **blocks)
    # 2. dk and dv
    grid = (triton.cdiv(T, key_blocks["N"]) * B * G,)
    strides.append(dk.stride())
    attention_key_kernel[grid](q, k, v, start, lse, dk, dv, dy, delta, *strides, T, G, *sizes, **key_blocks)
    return dq, dk, dv


_flash_attention_backward.register_fake(lambda dy, q, k, v, *_: (new_heads(q), new_heads(k), new_heads(v)))


def _flash_attention_setup(ctx, inputs, output):
    q, k, v, start, *ctx.options = inputs
    y, lse = output
    ctx.save_for_backward(q, k, v, start, y, lse)


def _flash_attention_gradient(ctx, dy, _):
    dq, dk, dv = _flash_attention_backward(dy, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, None, None, None


_flash_attention.register_autograd(_flash_attention_gradient, setup_context=_flash_attention_setup)


def _with_rows(x):
    """Returns x (..., D) with the numbers of a row side by side in memory: other strides may be any."""
    return x if x.stride(-1) == 1 else x.contiguous()


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: int = 0,
                    start: Tensor | None = None, scale: float | None = None) -> Tensor:  # fmt: skip
    """Returns softmax(scale q k^T) v without a (T, T) matrix in memory: FlashAttention-2 (arXiv 2307.08691).

    q (B, H, T, D), k and v (B, G, T, D) of any strides -> (B, H, T, D) in the memory order (B, T, H, D); H // G query
    heads share a key/value head; scale > 0 is 1 / sqrt(D) if None. Causal: query t sees the keys s <= t; of these, a
    window W > 0 leaves the last W, and start (B, T), where the document of each token begins, those from start[t] on.
    ValueError for either without causal. With P pairs seen, T (T + 1) / 2 or W T - W (W - 1) / 2, forward 4 B H D P
    FLOPs, backward 14, not 10: scores are computed twice there, so that no sum has an order left to chance.
    Floor of B 4, H 16, T 4096, D 128, causal, at 790 TFLOP/s: 0.35 and 1.22 ms.
    """
    if (window > 0 or start is not None) and not causal:
        raise ValueError(f"window={window} or start without causal=True: only a causal query has a first key")
    B, H, T, D = q.shape
    fits = k.shape == v.shape == (B, k.size(1), T, D) and H % k.size(1) == 0 and D in (16, 32, 64, 128)
    fits = fits and q.dtype == k.dtype == v.dtype
    if start is not None:
        fits = fits and start.shape == (B, T)
    if not runs("flash_attention", q, k, v, fits=fits):
        return flash_attention_ref(q, k, v, causal, window, start, scale)
    q = _with_rows(q)
    k = _with_rows(k)
    v = _with_rows(v)
    if start is not None:
        start = start.int().contiguous()
    if window >= T:
        window = 0
    if scale is None:
        scale = D**-0.5
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
    """Adds a @ b to sums, all in fp32 but for the operands."""
    if a.is_cuda:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(a.float(), b.float())


@operator
def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int,
                          grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the loss, the gradients of its sum over tokens, empty without grad, and one over how many are counted."""
    N = len(x)
    V = len(weight)
    losses = x.new_empty(N, dtype=torch.float32)
    dx = torch.zeros_like(x if grad else x[:0], dtype=torch.float32)
    dw = torch.zeros_like(weight if grad else weight[:0], dtype=torch.float32)
    buffer = x.new_empty(min(chunk, N), V)
    for i in range(0, N, chunk):
        tokens = x[i : i + chunk]  # (n, C)
        logits = torch.mm(tokens, weight.T, out=buffer[: len(tokens)])  # (n, V), which the kernel makes their gradient
        cross_entropy_kernel[(len(tokens),)](logits, targets[i:], losses[i:], V, grad, 8192, num_warps=16)
        if grad:
            _add_product(dx[i : i + chunk], logits, weight)
            _add_product(dw, logits.T, tokens)
    count = (targets != -1).sum()
    return losses.sum() / count, dx, dw, 1 / count.clamp(min=1).float()


@_linear_cross_entropy.register_fake
def _(x, weight, targets, chunk, grad):
    loss = x.new_empty((), dtype=torch.float32)
    dx = torch.empty_like(x if grad else x[:0], dtype=torch.float32)
    dw = torch.empty_like(weight if grad else weight[:0], dtype=torch.float32)
    return loss, dx, dw, torch.empty_like(loss)


def _linear_cross_entropy_setup(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)  # zeros for the unused outputs would be as large as the weight
    ctx.save_for_backward(*output[1:])


def _linear_cross_entropy_gradient(ctx, dloss, *_):
    dx, dw, scale = ctx.saved_tensors
    scale = scale * dloss  # here and not in the chunks, where 1 / count would underflow in fp16
    dx = torch.mul(dx, scale, out=torch.empty_like(dx, dtype=ctx.dtype))
    dw = torch.mul(dw, scale, out=torch.empty_like(dw, dtype=ctx.dtype))
    return dx, dw, None, None, None


_linear_cross_entropy.register_autograd(_linear_cross_entropy_gradient, setup_context=_linear_cross_entropy_setup)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 2048) -> Tensor:
    """Returns the mean cross-entropy, in fp32, of the logits x @ weight.T against targets (N,); -1 are ignored.

    x (N, C), weight (V, C). Logits exist for `chunk` tokens at a time: 2048 * 151,936 * 2 bytes = 0.62 GB for Qwen3.
    The gradients are made along with the loss and kept in fp32: 6 N C V FLOPs and 12 N V b bytes in all. A target
    outside [0, V) makes the loss NaN.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = weight.to(x.dtype)
    if not runs("linear_cross_entropy", x, weight):
        return linear_cross_entropy_ref(x, weight, targets)
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _linear_cross_entropy(x.contiguous(), weight.contiguous(), targets.contiguous(), chunk, grad)[0]


# ---- Mixture of experts ----------------------------------------------------------------------------------------------


def moe_plan(experts: Tensor, E: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the choices of experts (N, K) by expert, and cuts each expert's into tiles of b rows.

    Returns order (N K,), the sorted choices, of which n K + k is token n's k-th; edge (E + 1,), where each expert's
    begin in that order; and tiles (n, 2), expert and first row. n is the most there can be, so that no shape depends
    on the load: tiles left over begin at or behind the end of their expert. Three tokens of two choices, E = 3, b = 2:
        experts   2 0 | 2 1 | 2 0
        order     1 5 3 0 2 4          expert 0 has choices 1 and 5, expert 1 has 3, expert 2 has 0, 2, 4
        edge      0 2 3 6
        tiles     (0, 0) (1, 2) (2, 3) (2, 5)
    """
    expert, order = experts.flatten().int().sort(stable=True)
    edge = torch.searchsorted(expert, torch.arange(E + 1, device=expert.device, dtype=torch.int32))
    count = (edge.diff() + b - 1) // b  # (E,): tiles of each expert
    end = count.cumsum(0)
    n = min(len(expert), E + (len(expert) - E) // b)
    tile = torch.arange(n, device=expert.device)
    e = torch.searchsorted(end, tile, right=True).clamp(max=E - 1)
    first = edge[e] + (tile - (end - count)[e]) * b
    return order, edge, torch.stack((e, first), dim=1)


def moe_ref(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    N, K = experts.shape
    E, C, _ = w_gate.shape
    b = max(1, -(-N * K // E))  # the mean load: 2 E tiles at most
    # 1. a tile's rows, whose choice N K is padding, of a token of zeros
    order, edge, tiles = moe_plan(experts, E, b)
    e = tiles[:, 0]  # (n,)
    rows = tiles[:, 1:] + torch.arange(b, device=x.device)  # (n, b)
    inside = rows < edge[e + 1][:, None]
    choice = torch.where(inside, order[rows.clamp(max=N * K - 1)], N * K)  # (n, b)
    padded = torch.cat((x, x.new_zeros(1, C)))[choice // K]  # (n, b, C)
    # 2. the experts
    gate = padded @ w_gate.to(x.dtype).index_select(0, e)  # (n, b, I)
    up = padded @ w_up.to(x.dtype).index_select(0, e)  # (n, b, I)
    h = (F.silu(gate) * up) @ w_down.to(x.dtype).index_select(0, e)  # (n, b, C)
    # 3. back to the tokens
    y = h.new_zeros(N * K + 1, C).index_copy(0, choice.flatten(), h.flatten(0, 1))[:-1]
    return (y.view(N, K, C) * gates.to(x.dtype)[..., None]).sum(dim=1)


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
    """Returns launch options whose blocks fit 227 KB and the registers, and wider ones for one weight at a time."""
    BM, BN, BK = (128, 64, 32)
    if INTERPRETED:
        BM, BN, BK = (32, 32, 32)
    elif x.element_size() == 2:
        BM, BN, BK = (128, 128, 64)
    sizes = dict(BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3)
    wider = dict(sizes, BN=2 * BN)
    return sizes, wider


@operator
def _moe(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, gates: Tensor, order: Tensor, edge: Tensor, tiles: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y, and for the gradient g, u and h of each choice, h times its gate."""
    N, K = gates.shape
    _, C, I = w_gate.shape
    sizes, wider = moe_sizes(x)
    kept = x.new_empty(3, N * K, I)
    g, u, h = kept
    out = x.new_empty(N * K, C)
    plan = (order, edge, tiles, N * K, K)
    grid = (len(tiles) * triton.cdiv(I, sizes["BN"]),)
    moe_kernel[grid](x, w_gate, *plan, C, I, I, 1, True, W2=w_up, G=g, U=u, H=h, GATES=gates, **sizes)
    grid = (len(tiles) * triton.cdiv(C, wider["BN"]),)
    moe_kernel[grid](h, w_down, *plan, I, C, C, 1, False, OUT=out, **wider)
    return out.view(N, K, C).sum(dim=1), kept


_moe.register_fake(lambda x, w, _u, _d, gates, *_: (torch.empty_like(x), x.new_empty(3, gates.numel(), w.size(2))))


@operator
def _moe_backward(
    dy: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, gates: Tensor, order: Tensor, edge: Tensor,
    tiles: Tensor, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    N, K = gates.shape
    E, C, I = w_gate.shape
    sizes, wider = moe_sizes(x)
    plan = (order, edge, tiles, N * K, K)
    # 1. from dy to the gates' gradient and to dg, du
    g, u, h = kept
    dg = torch.empty_like(g)
    du = torch.empty_like(u)
    blocks = triton.cdiv(I, sizes["BN"])
    dgates = x.new_empty(blocks, N, K, dtype=torch.float32)
    grid = (len(tiles) * blocks,)
    moe_kernel[grid](dy, w_down, *plan, C, I, 1, C, True, G=g, U=u, GATES=gates, DG=dg, DU=du, DGATES=dgates, **sizes)
    # 2. from those to dx
    out = x.new_empty(N * K, C)
    grid = (len(tiles) * triton.cdiv(C, sizes["BN"]),)
    moe_kernel[grid](dg, w_gate, *plan, I, C, 1, I, False, A2=du, W2=w_up, OUT=out, **sizes)
    # 3. the weights' gradients
    dw_gate = torch.empty_like(w_gate)
    dw_up = torch.empty_like(w_up)
    dw_down = torch.empty_like(w_down)
    wider["num_stages"] = 5  # of which two wait for ORDER
    grid = (E * triton.cdiv(C, wider["BM"]) * triton.cdiv(I, wider["BN"]),)
    moe_weight_kernel[grid](x, dg, dw_gate, order, edge, K, C, I, I, 1, **wider)
    moe_weight_kernel[grid](x, du, dw_up, order, edge, K, C, I, I, 1, **wider)
    moe_weight_kernel[grid](dy, h, dw_down, order, edge, K, C, I, 1, C, **wider)
    return out.view(N, K, C).sum(dim=1), dw_gate, dw_up, dw_down, dgates.sum(dim=0).to(gates.dtype)


_moe_backward.register_fake(lambda dy, *saved: tuple(torch.empty_like(t) for t in saved[:5]))


def _moe_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of what is kept: zeros as large as it is
    ctx.save_for_backward(*inputs, output[1])


def _moe_gradient(ctx, dy, _):
    gradients = _moe_backward(dy.contiguous(), *ctx.saved_tensors)
    return *gradients, None, None, None


_moe.register_autograd(_moe_gradient, setup_context=_moe_setup)


def moe(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    """Returns y_n = sum over k of gates[n, k] silu(x_n w_gate[e]) * (x_n w_up[e]) w_down[e] with e = experts[n, k].

    x (N, C), w_gate and w_up (E, C, I), w_down (E, I, C), all cast to x's type; experts (N, K) int64, gates (N, K), 0
    for a dropped choice -> (N, C). Never waits for the device. Forward 6 N K C I FLOPs, backward 12 N K C I; floor of
    N = 32,768, E = 128, C = 2048, I = 768, K = 8 in bf16: 3.1 and 6.3 ms. Kept for backward: x, cast weights, and
    3 N K I b bytes.
    """
    if not runs("moe", x, w_gate, w_up, w_down, gates):
        return moe_ref(x, w_gate, w_up, w_down, experts, gates)
    weights = [w.to(x.dtype).contiguous() for w in (w_gate, w_up, w_down)]
    tile_rows = moe_sizes(x)[0]["BM"]
    plan = [t.int() for t in moe_plan(experts, len(w_gate), tile_rows)]
    return _moe(x.contiguous(), *weights, gates.contiguous(), *plan)[0]


# ---- Into a model ----------------------------------------------------------------------------------------------------
# Methods that take the place of a model's own, with the names and arguments that the model files share. As a partial of
# a function and the module they follow it into deep copies and torch.save; they leave to the class what has no kernel.


def _norm(self, x):
    return rms_norm(x, self.weight, self.eps)


def _norm_around_one(self, x):
    wide = torch.promote_types(self.weight.dtype, torch.float32)  # in bf16 a weight below 1/256 would be lost
    return rms_norm(x, 1 + self.weight.to(wide), self.eps)


def _mlp(self, x):
    return self.w_down(swiglu(self.w_gate(x), self.w_up(x)))


def _norm_and_rotate(self, q, k, angles):
    q = norm_rope(q, self.q_norm.weight, self.q_norm.eps, *angles)
    k = norm_rope(k, self.k_norm.weight, self.k_norm.eps, *angles)
    return q, k


def _norm_then_rotate(self, q, k, angles):
    return rope(self.q_norm(q), *angles), rope(self.k_norm(k), *angles)


def _rotate(self, q, k, angles):
    return rope(q, *angles), rope(k, *angles)


def _attend(self, q, k, v, mask):
    """Takes for a mask also where each token's document begins (B, T), in int32: what _positions_and_start returns."""
    scale = getattr(self, "scale", None)
    if mask is not None and mask.dtype == torch.int32:
        return flash_attention(q, k, v, start=mask, scale=scale)
    if mask is None and q.size(2) == k.size(2) > 1:
        return flash_attention(q, k, v, scale=scale)
    return type(self).attend(self, q, k, v, mask)


def _attend_by_mask(self, q, k, v, mask):
    """Computes what _attend does, also from a bool mask."""
    scale = getattr(self, "scale", None)
    if mask is None:
        return flash_attention_ref(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


def _positions_and_start(self, idx, cache=None):
    """Returns each token's position, and where its document begins (B, T): as much as a mask (B, 1, T, T) says."""
    T = idx.size(1)
    if cache is not None or self.config.eot_id < 0 or T == 1 or T > self.config.block_size:
        return type(self).positions_and_mask(self, idx, cache)
    place = torch.arange(T, device=idx.device)
    start = torch.where(idx == self.config.eot_id, place, 0).cummax(dim=1).values
    return place - start, start.int()


def _positions_and_mask(self, idx):
    """Returns the mask that _positions_and_start stands for."""
    positions, start = _positions_and_start(self, idx)
    place = torch.arange(idx.size(1))
    mask = (place >= start[:, :, None]) & (place <= place[:, None])  # (B, T, T)
    return positions, mask[:, None]


def _positions_and_starts(self, idx, cache=None):
    """Returns each token's position, and {letter of a layer: the first key that each token sees (B, T)}.

    As a local layer's query sees the keys of its document that are in its window, one start says both. Of a full layer
    without documents it is None.
    """
    T = idx.size(1)
    if cache is not None or T == 1 or T > self.config.block_size:
        return type(self).positions_and_mask(self, idx, cache)
    positions = torch.arange(T, device=idx.device)
    near = (positions - self.config.window + 1).clamp(min=0).int().expand(idx.shape)  # (B, T)
    start = None
    if self.config.eot_id >= 0:
        positions, start = _positions_and_start(self, idx)
        near = torch.maximum(near, start)
    return positions, dict(a=start, n=start, l=near, m=near)


def _positions_and_masks(self, idx):
    """Returns the masks that _positions_and_starts stands for."""
    positions, starts = _positions_and_starts(self, idx)
    place = torch.arange(idx.size(1))
    masks = {}
    for letter, start in starts.items():
        masks[letter] = None
        if start is not None:
            seen = (place >= start[:, :, None]) & (place <= place[:, None])  # (B, T, T)
            masks[letter] = seen[:, None]
    if self.config.eot_id < 0:  # the same for all rows
        masks["l"] = masks["m"] = masks["l"][:1]
    return positions, masks


def _experts(self, x, chosen, gates):
    return moe(x, self.w_gate.weight, self.w_up.weight, self.w_down.weight, chosen, gates)


def _lm_loss(self, x, targets):
    head = getattr(self, "lm_head", None)
    if head is None:
        head = self.embed
    return linear_cross_entropy(x.flatten(0, 1), head.weight, targets.flatten())


# A method is taken over only where it is proved to compute the same: it and its candidates run on small random inputs
# and weights, in training mode and with plain twins for kernels, and outputs and gradients are compared. What a variant
# changed is found by that, whatever the change is.
#
# The method runs on its own module, whose flags are the true ones, with weights lent to it for the call: made anew,
# since a model on the meta device has none yet, in fp64, where rounding hides no difference, and small. To build a
# small module instead one would have to know which fields of a variant's config are sizes.


@dataclass
class Candidate:
    """A method that computes an operation by its kernel. twin: what is compared in its place, if its inputs differ."""

    operation: str
    method: Callable
    twin: Callable | None = None


@dataclass
class Seam:
    """A method of the model files that kernels can take over: the first candidate that computes the same does."""

    owner: str  # the name of its class
    method: str
    inputs: Callable  # (model, module) -> what to compare it on: a list of tuples of arguments
    candidates: list[Candidate]

    def choose(self, model, module):
        """Returns a candidate, or None and why."""
        own = getattr(type(module), self.method)
        if self.method in vars(module):
            return None, "overridden already"
        weights = stand_ins(module)
        try:
            trials = self.inputs(model, module)
            wanted = [results(module, own, weights, inputs) for inputs in trials]
        except Exception as error:  # a variant's method may ask for anything
            return None, f"not tried, {type(error).__name__}"
        for candidate in self.candidates:
            method = candidate.method
            if candidate.twin is not None:
                method = candidate.twin
            try:
                got = [results(module, method, weights, inputs) for inputs in trials]
            except Exception:  # for example a weight that the module does not have
                continue
            if all(same(a, b) for a, b in zip(got, wanted)):
                return candidate, ""
        return None, "computes something else"


class Method(torch.nn.Module):
    """A module's method as a module, for functional_call."""

    def __init__(self, module, method):
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *inputs):
        return self.method(self.module, *inputs)


def narrow(n):
    """Returns a small width for a large one, by one rule for all tensors: those that fit together still do."""
    return n if n <= 256 else 32


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def stand_ins(module):
    """Returns {name: tensor} for a module's parameters and buffers, except those of a model's blocks.

    Those have seams of their own. Matrices are narrow, and all experts are there: 128 of 32 x 32 for 128 of 2048 x 768.
    """
    tensors = {}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        shape = [*x.shape[:-2], *map(narrow, x.shape[-2:])]
        if name.startswith("blocks."):
            continue
        if x.is_floating_point():
            tensors[name] = 0.3 * normal(*shape)
        else:
            tensors[name] = torch.zeros(shape, dtype=x.dtype)
    return tensors


def results(module, method, weights, inputs):
    """Returns the outputs of a module's method, and along random directions the gradients of inputs and weights."""

    def leaf(x):
        if torch.is_tensor(x) and x.dtype == torch.float64:
            return x.clone().requires_grad_()
        return x

    weights = {f"module.{name}": leaf(x) for name, x in weights.items()}
    inputs = tuple(leaf(x) for x in inputs)
    torch.default_generator.manual_seed(0)  # what a method draws: torch.manual_seed would reset the GPUs' numbers too
    outputs = tree_leaves(functional_call(Method(module, method), weights, inputs))
    outputs = [y for y in outputs if y is not None]  # None for a mask that hides nothing but what comes later
    moving = [y for y in outputs if y.requires_grad]
    if not moving:
        return outputs
    torch.default_generator.manual_seed(1)
    directions = [normal(*y.shape).to(y.dtype) for y in moving]
    leaves = [x for x in (*inputs, *weights.values()) if torch.is_tensor(x) and x.requires_grad]
    return [*outputs, *torch.autograd.grad(moving, leaves, directions, materialize_grads=True)]


def same(ours, theirs):
    """Returns whether two lists of results are equal, up to the rounding of a method that computes in fp32 inside."""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs):
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            return False
        if not b.is_floating_point() and not torch.equal(a, b):
            return False
        if b.is_floating_point() and not (a - b).abs().max() <= 1e-4 * b.abs().max():  # False for NaN
            return False
    return True


@contextmanager
def proving(model):
    """Sets training mode and twins in place of kernels; puts these and the random numbers back afterwards."""
    global TWINS_ONLY
    training = {module: module.training for module in model.modules()}
    TWINS_ONLY = True
    try:
        for module in training:
            module.training = True
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)
            yield
    finally:
        TWINS_ONLY = False
        for module, mode in training.items():
            module.training = mode


# What methods are compared on. Each is tried at two scales: small rows show an eps, large ones a cap or a clamp.


def norm_inputs(model, module):
    x = normal(2, 3, narrow(module.weight.numel()))
    return [(x,), (0.001 * x,)]


def mlp_inputs(model, module):
    x = normal(2, 3, narrow(model.config.n_embd))
    return [(x,), (10 * x,)]


def rotate_inputs(model, module):
    angles = sys.modules[type(model).__module__].rope_cos_sin
    cos, sin = angles(torch.randint(model.config.block_size, (2, 3)), model.config)  # (2, 3, 1, D/2)
    D = getattr(module, "head_dim", 2 * cos.size(-1))
    q = normal(2, 3, 4, D)
    k = normal(2, 3, 2, D)
    return [(q, k, (cos, sin)), (0.001 * q, 0.001 * k, (cos, sin))]


def attend_inputs(model, module):
    H = model.config.n_head
    G = getattr(model.config, "n_kv_head", H)
    D = getattr(module, "head_dim", 16)
    # 1. few tokens, without documents and with them: tokens 0 and 3 begin one
    q = normal(2, H, 8, D)
    k = normal(2, G, 8, D)
    v = normal(2, G, 8, D)
    documents = torch.ones(8, 8, dtype=torch.bool).tril()
    documents[3:, :3] = False
    # 2. as many tokens as a window could hide some of, and the last ones behind a past: one head, in fp32, no gradients
    T = min(model.config.block_size, 8192)
    queries, keys, values = normal(3, 1, 1, T, D).float()
    causal = torch.ones(3, T, dtype=torch.bool).tril(T - 3)
    return [
        (q, k, v, None),
        (10 * q, k, v, documents.expand(2, 1, 8, 8)),
        (queries, keys, values, None),
        (queries[:, :, -3:], keys, values, causal),
    ]


def experts_inputs(model, module):
    E, C, _ = module.w_gate.weight.shape
    K = model.config.n_expert_per_token
    x = normal(7, narrow(C))
    chosen = torch.rand(7, E).topk(K).indices
    gates = normal(7, K)
    gates[3] = 0.0
    return [(x, chosen, gates), (10 * x, chosen, gates)]


def lm_loss_inputs(model, module):
    x = normal(2, 5, narrow(model.config.n_embd))
    targets = torch.randint(narrow(model.config.vocab_size), (2, 5))
    targets[0, :2] = -1
    return [(x, targets), (30 * x, targets)]


def positions_inputs(model, module):
    config = model.config
    T = min(config.block_size, 8192)  # a mask of 67 MB
    short = config.eot_id + torch.randint(2, (2, min(T, 64)))  # documents, of which about half are one token
    long = torch.full((1, T), config.eot_id + 1)
    return [(short,), (long,)]


NORM = [Candidate("rms_norm", _norm), Candidate("rms_norm", _norm_around_one)]
ROTATE = [Candidate("norm_rope", _norm_and_rotate), Candidate("rope", _norm_then_rotate), Candidate("rope", _rotate)]
ATTEND = [Candidate("flash_attention", _attend, twin=_attend_by_mask)]
POSITIONS = [
    Candidate("document_starts", _positions_and_start, twin=_positions_and_mask),
    Candidate("window_starts", _positions_and_starts, twin=_positions_and_masks),
]
SEAMS = [
    Seam("RMSNorm", "forward", norm_inputs, NORM),
    Seam("MLP", "forward", mlp_inputs, [Candidate("swiglu", _mlp)]),
    Seam("Attention", "rotate", rotate_inputs, ROTATE),
    Seam("Attention", "attend", attend_inputs, ATTEND),
    Seam("MoE", "experts", experts_inputs, [Candidate("moe", _experts)]),
    Seam("GPT", "lm_loss", lm_loss_inputs, [Candidate("linear_cross_entropy", _lm_loss)]),
]
DOCUMENTS = Seam("GPT", "positions_and_mask", positions_inputs, POSITIONS)  # goes with every attend, or with none


class Installed(NamedTuple):
    """What install did: {operation: methods that its kernel took over}, {method (why): how many stay as they are}."""

    swapped: dict[str, int]
    left_alone: dict[str, int]

    def __str__(self):
        text = ", ".join(f"{n} x {name}" for name, n in self.swapped.items())
        if self.left_alone:
            text += "; left alone: " + ", ".join(f"{n} x {name}" for name, n in self.left_alone.items())
        return text


def install(model: torch.nn.Module, seams: Sequence[Seam] = SEAMS) -> Installed:
    """Lets kernels take over the methods of a model that compute the same, in place, and returns how many of what.

    Parameters and their names are untouched, results differ by rounding. To be done before torch.compile and before
    weights are sharded; they need not exist yet. `uninstall` undoes it.
    """
    modules = list(model.modules())
    if any("swapped" in vars(module) for module in modules):
        raise ValueError("the kernels are installed already: uninstall(model) first")
    taken = []  # (module, seam, candidate)
    left_alone = Counter()
    with proving(model):
        # 1. each method by itself
        rotated = set()  # norms that a rotation does too; they come behind it, as children of its module
        for module in modules:
            for seam in seams:
                if type(module).__name__ != seam.owner or not hasattr(module, seam.method) or module in rotated:
                    continue
                candidate, why = seam.choose(model, module)
                if candidate is None:
                    left_alone[f"{seam.owner}.{seam.method} ({why})"] += 1
                    continue
                taken.append((module, seam, candidate))
                if candidate.method is _norm_and_rotate:
                    rotated |= {module.q_norm, module.k_norm}
        # 2. with documents or windows, starts in place of the mask, if all that take the mask are methods from here
        attending = [module for module, seam, _ in taken if seam.method == "attend"]
        if attending and (model.config.eot_id >= 0 or hasattr(model.config, "window")):
            candidate, why = DOCUMENTS.choose(model, model)
            needing = [m for m in modules if hasattr(m, "attend") or type(m).__name__ == "Indexer"]
            if len(attending) < len(needing):
                candidate = None
                why = "another one needs the mask"
            if candidate is None:
                taken = [each for each in taken if each[1].method != "attend"]
                left_alone[f"Attention.attend (its mask: {why})"] += len(attending)
            else:
                taken.append((model, DOCUMENTS, candidate))
    for module, seam, candidate in taken:
        setattr(module, seam.method, functools.partial(candidate.method, module))
        vars(module).setdefault("swapped", []).append(seam.method)
    return Installed(dict(Counter(candidate.operation for *_, candidate in taken)), dict(left_alone))


def uninstall(model: torch.nn.Module) -> None:
    """Gives every part of the model its own methods again."""
    for module in model.modules():
        for name in vars(module).pop("swapped", ()):
            delattr(module, name)
