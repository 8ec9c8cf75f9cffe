"""The chunked gated delta rule in Triton, below its PyTorch twin: a section of kernels.py in a file of its own.

    S_t = exp(log_decay_t) S_{t-1} + k_t beta_t (v_t - exp(log_decay_t) S_{t-1}^T k_t)^T        y_t = S_t^T q_t

    kernels_delta.install(model)      is kernels.install, with this kernel too

In chunks of L = 64 tokens (https://arxiv.org/abs/2412.06464, section 3.3): what the tokens of a chunk write is the
solution of a triangular system, and only the state goes from chunk to chunk. Forward: prepare (all chunks at once),
then scan (one after the other). Backward: both again, a scan from the end, then the gradients (all chunks at once).

B   batch
T   time
H   heads
N   chunks of a sequence
L   tokens of a chunk
Dk  width of keys
Dv  width of values
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import jit, operator, runs, tl, triton


def gated_delta_rule_ref(q, k, v, log_decay, beta, first, state, chunk=64):
    dtype = v.dtype
    # 1. cut into N chunks of L tokens; the padding at the right writes nothing and decays nothing
    T = q.size(2)
    L = min(T, chunk)
    missing = -T % L
    q = F.pad(q, (0, 0, 0, missing)).unflatten(2, (-1, L)).to(state.dtype)  # (B, H, N, L, Dk)
    k = F.pad(k, (0, 0, 0, missing)).unflatten(2, (-1, L)).to(state.dtype)  # (B, H, N, L, Dk)
    v = F.pad(v, (0, 0, 0, missing)).unflatten(2, (-1, L)).to(state.dtype)  # (B, H, N, L, Dv)
    log_decay = F.pad(log_decay, (0, missing)).unflatten(2, (-1, L))  # (B, H, N, L)
    beta = F.pad(beta, (0, missing)).unflatten(2, (-1, L))[..., None]  # (B, H, N, L, 1)
    first = F.pad(first, (0, missing)).unflatten(2, (-1, L))  # (B or 1, 1, N, L)

    # 2. decay[i, j]: what is left at i of what j wrote; 0 is the state before the chunk, 1 the chunk's first token.
    #    Each entry sums its own steps: differences of running sums would feel what lies before j, or overflow.
    log_decay = F.pad(log_decay, (1, 0))  # (B, H, N, L + 1)
    later = torch.ones(L + 1, L + 1, dtype=torch.bool, device=q.device).tril(-1)  # i > j
    decay = torch.where(later, log_decay[..., None], 0.0).cumsum(dim=-2).exp()  # (B, H, N, L + 1, L + 1)
    document = F.pad(first, (1, 0)).cumsum(dim=-1)  # (B or 1, 1, N, L + 1)
    same = document[..., :, None] == document[..., None, :]
    decay = decay * same.tril()
    start = decay[..., 1:, :1]  # (B, H, N, L, 1), of the state
    inner = decay[..., 1:, 1:]  # (B, H, N, L, L)
    end = decay[..., -1, :, None]  # (B, H, N, L + 1, 1)

    # 3. what a token writes depends on what those before it wrote: solve (1 + A) [u, w] = beta [v, k start]
    A = (k @ k.mT) * inner * beta  # used below its diagonal
    both = torch.cat((v, k * start), dim=-1) * beta
    solved = torch.linalg.solve_triangular(A, both, upper=False, unitriangular=True)
    u, w = solved.tensor_split((v.size(-1),), dim=-1)

    # 4. from chunk to chunk
    scores = (q @ k.mT) * inner  # (B, H, N, L, L)
    q = q * start
    k = k * end[..., 1:, :]
    y = []
    for n in range(q.size(2)):
        written = u[:, :, n] - w[:, :, n] @ state  # (B, H, L, Dv)
        y.append(q[:, :, n] @ state + scores[:, :, n] @ written)
        state = state * end[:, :, n, :1] + k[:, :, n].mT @ written
    return torch.cat(y, dim=2)[:, :, :T].to(dtype), state


@jit
def delta_chunk(n, bh, T, N, H, L: tl.constexpr):
    """Of chunk n of head bh: which tokens exist (L,), the first one's row of (B, T, H), its own row of (B, H, N)."""
    row = (bh // H * T + n * L).to(tl.int64) * H + bh % H
    return n * L + tl.arange(0, L) < T, row, bh.to(tl.int64) * N + n


@jit
def delta_load(X, row, live, cols, H, D: tl.constexpr):  # these columns of (B, T, H, D): (L, columns)
    at = row * D + tl.arange(0, live.shape[0])[:, None] * (H * D) + cols
    return tl.load(X + at, live[:, None] & (cols < D), 0.0)


@jit
def delta_store(X, row, live, cols, x, H, D: tl.constexpr):
    at = row * D + tl.arange(0, live.shape[0])[:, None] * (H * D) + cols
    tl.store(X + at, x, live[:, None] & (cols < D))


@jit
def delta_decay(LOG_DECAY, DOCUMENT, row, live, n, T, H, L: tl.constexpr):
    """What is left at i of what j wrote (L, L), and of the state before the chunk (L,). See the twin's step 2."""
    i, before = tl.arange(0, L), tl.load(DOCUMENT + n * L - 1, n > 0, 0)
    g, document = tl.load(LOG_DECAY + row + i * H, live, 0.0), tl.load(DOCUMENT + tl.minimum(n * L + i, T - 1))
    decay = tl.exp(tl.cumsum(tl.where(i[:, None] > i, g[:, None], 0.0), axis=0))
    decay = tl.where((i[:, None] >= i) & (document[:, None] == document), decay, 0.0)
    return decay, tl.where(document == before, tl.exp(tl.cumsum(g, axis=0)), 0.0)


@jit
def delta_inverse(A, SIZE: tl.constexpr, P: tl.constexpr):
    """1 / (1 + A) of a strictly lower A, by diagonal blocks of s = 2, 4 ..: 1 / [[b, 0], [a, c]] is
    [[1/b, 0], [-1/c a 1/b, 1/c]]. A series in powers of A would not do: they grow to 1e17 where keys repeat."""
    pair, s = tl.arange(0, SIZE)[:, None] ^ tl.arange(0, SIZE), 2
    inverse = tl.where(pair == 0, 1.0, tl.where(pair == 1, -A, 0.0))
    while s < SIZE:
        half = tl.dot(inverse, tl.where(pair // s == 1, A, 0.0), input_precision=P)
        inverse -= tl.dot(half, inverse, input_precision=P)
        s *= 2
    return inverse


@jit
def delta_prepare_kernel(Q, K, LOG_DECAY, BETA, DOCUMENT, INVERSE, SCORES, KEYS, ENDS, T, N, H, DK: tl.constexpr,
                         BK: tl.constexpr, L: tl.constexpr, P: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    n, bh, i = tl.program_id(0), tl.program_id(1), tl.arange(0, L)
    live, row, chunk = delta_chunk(n, bh, T, N, H, L)
    A, scores = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    for d in range(0, DK, BK):
        k = delta_load(K, row, live, d + tl.arange(0, BK), H, DK)
        A += tl.dot(k, tl.trans(k), input_precision=EXACT)  # the inverse magnifies errors where keys are alike
        scores += tl.dot(delta_load(Q, row, live, d + tl.arange(0, BK), H, DK), tl.trans(k), input_precision=P)
    decay, start = delta_decay(LOG_DECAY, DOCUMENT + bh // H * T, row, live, n, T, H, L)
    A, square = tl.where(i[:, None] > i, A * decay, 0.0), chunk * L * L + i[:, None] * L + i
    tl.store(SCORES + square, scores * decay)
    tl.store(KEYS + square, A)
    tl.store(ENDS + chunk * 2 * L + i, start)
    tl.store(ENDS + chunk * 2 * L + L + i, tl.sum(tl.where(i[:, None] == L - 1, decay, 0.0), axis=0))
    A *= tl.load(BETA + row + i * H, live, 0.0)[:, None]
    left, right = tl.split(tl.permute(tl.reshape(A, (2, L // 2, 2, L // 2)), (1, 3, 0, 2)))
    a, c = tl.split(left)  # A = [[a, 0], [c, d]]
    _, d = tl.split(right)
    a, d = delta_inverse(a, L // 2, EXACT), delta_inverse(d, L // 2, EXACT)
    c = tl.dot(tl.dot(d, c, input_precision=EXACT), a, input_precision=EXACT)
    left, right = tl.join(a, -c), tl.join(tl.zeros_like(a), d)
    tl.store(INVERSE + square, tl.reshape(tl.permute(tl.join(left, right), (2, 0, 3, 1)), (L, L)))


@jit
def delta_scan_kernel(Q, K, V, BETA, INVERSE, SCORES, ENDS, STATE, Y, LAST, STATES, T, N, H, DK: tl.constexpr,
                      DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
                      REVERSE: tl.constexpr):  # fmt: skip
    """Chunk after chunk: y; or with STATES those before each chunk, and what was written. REVERSE: the gradients, from
    the last chunk to the first, with dy for V: in STATES those of the states after each, in Y of (v - S^T k) beta."""
    bh, i, d, c = tl.program_id(1), tl.arange(0, L), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    square, at, inside = i[:, None] * L + i, d[:, None] * DV + c, (d < DK)[:, None] & (c < DV)
    state = tl.load(STATE + bh.to(tl.int64) * DK * DV + at, inside, 0.0)  # (Dk, BV)
    for step in range(N):
        live, row, chunk = delta_chunk(N - 1 - step if REVERSE else step, bh, T, N, H, L)
        beta, start = tl.load(BETA + row + i * H, live, 0.0), tl.load(ENDS + chunk * 2 * L + i)
        end, rest = tl.load(ENDS + chunk * 2 * L + L + i), tl.load(ENDS + chunk * 2 * L + L - 1)
        k, v = delta_load(K, row, live, d, H, DK), delta_load(V, row, live, c, H, DV)
        past = state.to(k.dtype)
        y = tl.dot(k, past, input_precision=P)  # (L, BV)
        inverse = tl.load(INVERSE + chunk * L * L + square)
        if REVERSE:
            scores, q = tl.load(SCORES + chunk * L * L + square), delta_load(Q, row, live, d, H, DK)
            y = y * end[:, None] + tl.dot(tl.trans(scores), v, input_precision=P)  # of what was written
            y = tl.dot(tl.trans(inverse), y.to(k.dtype), input_precision=P)
            state = state * rest + tl.dot(tl.trans(q), (v * start[:, None]).to(k.dtype), input_precision=P)
            change = y * (-start * beta)[:, None]
        else:
            y = tl.dot(inverse, ((v - y * start[:, None]) * beta[:, None]).to(k.dtype), input_precision=P)
            state, change = state * rest, y * end[:, None]
            if STATES is None:
                written, y = y.to(k.dtype), tl.dot(delta_load(Q, row, live, d, H, DK), past, input_precision=P)
                scores = tl.load(SCORES + chunk * L * L + square)
                y = y * start[:, None] + tl.dot(scores, written, input_precision=P)
        delta_store(Y, row, live, c, y, H, DV)
        if STATES is not None:
            tl.store(STATES + chunk * DK * DV + at, past, inside)
        state += tl.dot(tl.trans(k), change.to(k.dtype), input_precision=P)
    if LAST is not None:
        tl.store(LAST + bh.to(tl.int64) * DK * DV + at, state, inside)


@jit
def delta_gradient_kernel(Q, K, V, LOG_DECAY, BETA, DOCUMENT, SCORES, KEYS, ENDS, DY, WRITTEN, DW, STATES, DSTATES, DQ,
                          DKEY, DVALUE, DLOG, DBETA, T, N, H, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
                          BV: tl.constexpr, L: tl.constexpr, P: tl.constexpr):  # fmt: skip
    n, bh, i = tl.program_id(0), tl.program_id(1), tl.arange(0, L)
    live, row, chunk = delta_chunk(n, bh, T, N, H, L)
    beta, start = tl.load(BETA + row + i * H, live, 0.0), tl.load(ENDS + chunk * 2 * L + i)
    end, lower = tl.load(ENDS + chunk * 2 * L + L + i), i[:, None] > i[None, :]
    dbeta, dstart, dend = tl.zeros((L,), tl.float32), tl.zeros((L,), tl.float32), tl.zeros((L,), tl.float32)
    # 1. within the chunk
    dscores, dA = tl.zeros((L, L), tl.float32), tl.zeros((L, L), tl.float32)
    for first in range(0, DV, BV):
        c = first + tl.arange(0, BV)
        written, dw = delta_load(WRITTEN, row, live, c, H, DV), delta_load(DW, row, live, c, H, DV)
        dscores += tl.dot(delta_load(DY, row, live, c, H, DV), tl.trans(written), input_precision=P)
        dA -= tl.dot(dw, tl.trans(written), input_precision=P)
        dbeta += tl.sum(dw.to(tl.float32) * delta_load(V, row, live, c, H, DV), axis=1)
        delta_store(DVALUE, row, live, c, dw * beta[:, None], H, DV)
    decay, _ = delta_decay(LOG_DECAY, DOCUMENT + bh // H * T, row, live, n, T, H, L)
    square = chunk * L * L + i[:, None] * L + i
    dkeys = dA * tl.load(KEYS + square)
    dbeta += tl.sum(dkeys, axis=1)
    steps = tl.where(lower, dscores * tl.load(SCORES + square) + dkeys * beta[:, None], 0.0)
    # A step's decay is part of every entry (i, j) with j < step <= i.
    dlog = tl.sum(tl.where(lower, tl.cumsum(steps, axis=0, reverse=True), 0.0), axis=1)
    dscores, dA = (dscores * decay).to(K.dtype.element_ty), tl.where(lower, dA * decay * beta[:, None], 0.0)
    dA = (dA + tl.trans(dA)).to(K.dtype.element_ty)
    # 2. through the states before and after it
    for first in range(0, DK, BK):
        d, rest = first + tl.arange(0, BK), tl.zeros((BK,), tl.float32)
        dq, dk, dk_past = tl.zeros((L, BK), tl.float32), tl.zeros((L, BK), tl.float32), tl.zeros((L, BK), tl.float32)
        for column in range(0, DV, BV):
            c = column + tl.arange(0, BV)
            at, inside = chunk * DK * DV + d[:, None] * DV + c, (d < DK)[:, None] & (c < DV)
            past, later = tl.load(STATES + at, inside, 0.0), tl.load(DSTATES + at, inside, 0.0)
            dq += tl.dot(delta_load(DY, row, live, c, H, DV), tl.trans(past), input_precision=P)
            dk += tl.dot(delta_load(WRITTEN, row, live, c, H, DV), tl.trans(later), input_precision=P)
            dk_past -= tl.dot(delta_load(DW, row, live, c, H, DV), tl.trans(past), input_precision=P)
            rest += tl.sum(past.to(tl.float32) * later, axis=1)
        q, k = delta_load(Q, row, live, d, H, DK), delta_load(K, row, live, d, H, DK)
        seen, dend = tl.sum(dk_past * k, axis=1) * start, dend + tl.sum(dk * k, axis=1) * end
        dbeta += seen
        dstart += seen * beta + (tl.sum(dq * q, axis=1) + tl.where(i == L - 1, tl.sum(rest), 0.0)) * start
        dq = dq * start[:, None] + tl.dot(dscores, k, input_precision=P)
        delta_store(DQ, row, live, d, dq, H, DK)
        dk = dk * end[:, None] + dk_past * (start * beta)[:, None]
        dk += tl.dot(tl.trans(dscores), q, input_precision=P)
        delta_store(DKEY, row, live, d, dk + tl.dot(dA, k, input_precision=P), H, DK)
    dlog += tl.cumsum(dstart, axis=0, reverse=True) + tl.sum(tl.where(lower, dend[None, :], 0.0), axis=1)
    tl.store(DLOG + row + i * H, dlog, live)
    tl.store(DBETA + row + i * H, dbeta, live)


def delta_sizes(q, v):
    """Returns the grids, the integers and constants of each kernel, and the launch options."""
    B, T, H, Dk = q.shape
    Dv = v.size(-1)
    L = 64
    N = triton.cdiv(T, L)
    P = "tf32"
    if torch.get_float32_matmul_precision() == "highest":
        P = "ieee"
    exact = "tf32x3"  # fp32 by tensor cores
    block = 64
    columns = 32
    options = dict(num_warps=4, num_stages=3)
    if q.dtype == torch.float32:  # tiles that fit the shared memory
        block = 32
        columns = 16
        options = dict(num_warps=4, num_stages=2)
    if q.dtype == torch.float32 and P == "ieee":  # and nearly fit the registers, without tensor cores
        exact = "ieee"
        block = 16
        options = dict(num_warps=8, num_stages=1)
    BK = max(16, triton.next_power_of_2(Dk))
    BV = max(16, triton.next_power_of_2(Dv))
    columns = min(columns, BV)
    return SimpleNamespace(
        grid=(N, B * H),
        scan_grid=(triton.cdiv(Dv, columns), B * H),
        prepare=(T, N, H, Dk, min(BK, block), L, P, exact),
        scan=(T, N, H, Dk, Dv, BK, columns, L, P),
        gradient=(T, N, H, Dk, Dv, min(BK, block), min(BV, block), L, P),
        options=options,
    )


def delta_prepare(q, k, log_decay, beta, document, sizes):
    """Returns 1 / (1 + A), the scores and A without beta (B H, N, L, L), and what is left of states (B H, N, 2, L).

    Of the state before the chunk at each token, and of what each token wrote at the end.
    """
    N, BH = sizes.grid
    inverse = q.new_empty(BH, N, 64, 64)
    scores = torch.empty_like(inverse)
    keys = torch.empty_like(inverse)
    ends = beta.new_empty(BH, N, 2, 64)
    delta_prepare_kernel[sizes.grid](
        q, k, log_decay, beta, document, inverse, scores, keys, ends, *sizes.prepare, **sizes.options
    )
    return inverse, scores, keys, ends


@operator
def _gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, document: Tensor,
                      state: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = delta_sizes(q, v)
    inverse, scores, _, ends = delta_prepare(q, k, log_decay, beta, document, sizes)
    y = torch.empty_like(v)
    last = torch.empty_like(state)
    delta_scan_kernel[sizes.scan_grid](
        q, k, v, beta, inverse, scores, ends, state, y, last, None, *sizes.scan, False, **sizes.options
    )
    return y, last


_gated_delta_rule.register_fake(lambda *inputs: (torch.empty_like(inputs[2]), torch.empty_like(inputs[6])))


@operator
def _gated_delta_rule_backward(dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
                               beta: Tensor, document: Tensor, state: Tensor
                               ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = delta_sizes(q, v)
    N, BH = sizes.grid
    # 1. what was written, and the states before each chunk
    inverse, scores, keys, ends = delta_prepare(q, k, log_decay, beta, document, sizes)
    written = torch.empty_like(v)
    states = q.new_empty(BH, N, *state.shape[2:])
    delta_scan_kernel[sizes.scan_grid](
        q, k, v, beta, inverse, scores, ends, state, written, None, states, *sizes.scan, False, **sizes.options
    )
    # 2. from the last chunk to the first, the gradients of both
    dw = torch.empty_like(v)
    dstates = torch.empty_like(states)
    dstate = torch.empty_like(state)
    delta_scan_kernel[sizes.scan_grid](
        q, k, dy, beta, inverse, scores, ends, dlast, dw, dstate, dstates, *sizes.scan, True, **sizes.options
    )
    # 3. those of the inputs
    gradients = [torch.empty_like(x) for x in (q, k, v, log_decay, beta)]
    sizes.options["num_warps"] = 8
    delta_gradient_kernel[sizes.grid](
        q, k, v, log_decay, beta, document, scores, keys, ends, dy, written, dw, states, dstates,
        *gradients, *sizes.gradient, **sizes.options,
    )  # fmt: skip
    return *gradients, dstate


_gated_delta_rule_backward.register_fake(lambda *inputs: tuple(torch.empty_like(inputs[i]) for i in (2, 3, 4, 5, 6, 8)))


def _gated_delta_rule_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gated_delta_rule_gradient(ctx, dy, dlast):
    *gradients, dstate = _gated_delta_rule_backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors)
    return *gradients, None, dstate


_gated_delta_rule.register_autograd(_gated_delta_rule_gradient, setup_context=_gated_delta_rule_setup)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, first: Tensor,
                     state: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y and the last S of S = exp(log_decay) S; S = S + k beta (v - S^T k)^T; y = S^T q, token by token.

    q, k (B, H, T, Dk), v and y (B, H, T, Dv), log_decay, beta (B, H, T) and state S (B, H, Dk, Dv) in fp32, widths up
    to 128; first (B or 1, 1, T): a document begins here. Views of (B, T, H, .) are read as they are, others copied.
    A token and head takes 6 Dk Dv + 128 (3 Dk + 2 Dv) FLOPs and (2 Dk + 2 Dv) b + 8 bytes: 0.031 ms at 4.3 TB/s for
    T = 8192, 16 heads of 128 in bf16. But chunks follow each other: 128 steps, however fast the GPU.
    """
    fits = log_decay.dtype == beta.dtype == state.dtype == torch.float32 and q.dtype == k.dtype == v.dtype
    fits = fits and q.size(-1) <= 128 and v.size(-1) <= 128
    if not runs("gated_delta_rule", q, k, v, fits=fits):
        return gated_delta_rule_ref(q, k, v, log_decay, beta, first, state)
    inputs = [x.transpose(1, 2).contiguous() for x in (q, k, v, log_decay, beta)]  # (B, T, H, .)
    document = first[:, 0].cumsum(dim=-1, dtype=torch.int32).expand(len(q), -1).contiguous()  # (B, T)
    y, last = _gated_delta_rule(*inputs, document, state.contiguous())
    return y.transpose(1, 2), last


# ---- Into a model ----------------------------------------------------------------------------------------------------


def _delta_rule(self, q, k, v, log_decay, beta, first, state):
    if q.size(2) == 1:  # a single token needs no chunk
        return type(self).delta_rule(self, q, k, v, log_decay, beta, first, state)
    return gated_delta_rule(q, k, v, log_decay, beta, first, state)


def delta_rule_inputs(model, module):
    normal = kernels.normal
    q = normal(2, 3, 70, 8)
    k = F.normalize(normal(2, 3, 70, 8), dim=-1)
    v = normal(2, 3, 70, 6)
    log_decay = -normal(2, 3, 70).abs()
    beta = normal(2, 3, 70).sigmoid()
    first = torch.zeros(2, 1, 70, dtype=torch.bool)
    first[0, 0, [5, 66]] = True
    state = normal(2, 3, 8, 6)
    return [(q, k, v, log_decay, beta, first, state), (q, k, 10 * v, 10 * log_decay, beta, first, 10 * state)]


DELTA_RULE = kernels.Seam(
    "GatedDelta", "delta_rule", delta_rule_inputs, [kernels.Candidate("gated_delta_rule", _delta_rule)]
)


def install(model: torch.nn.Module) -> kernels.Installed:
    """Does what kernels.install does, with the delta rule's kernel too."""
    return kernels.install(model, [*kernels.SEAMS, DELTA_RULE])
