"""As in Qwen3-Next: layers that remember in a matrix by the gated delta rule, with gated attention every few.

    q, k, v = silu(conv(Wq u, Wk u, Wv u)), then k is brought to length 1, q to 1 / sqrt(Dk)    u = RMSNorm(x)
    decay = exp(-exp(A_log) softplus(Wa u + dt_bias)), beta = sigmoid(Wb u)
    M = decay M;  M = M + k (beta (v - M^T k))^T;  y = M^T q        (https://arxiv.org/abs/2412.06464)
    x = x + Wo (RMSNorm(y) * silu(Wz u)), or the attention of model_gated.py where layer_pattern says a

M^T k is what the memory answers to the key k: with beta = 1 writing replaces that answer by v, where linear attention
would add v to it. M has one size at every length, so a token costs a delta layer as much after 100,000 others as after
10.

B  batch
T  time: the tokens of one call
S  time with the cached past
C  n_embd, the width of the residual stream
H  query heads
G  key/value heads
D  head_dim
V  vocabulary
Hk key heads of a delta layer
Hv value heads of a delta layer, Hv / Hk to a key head
Dk key_dim
Dv value_dim
K  conv_kernel, the taps of the convolution
M  state (Dk, Dv), the memory of one value head
N  chunks
L  tokens of a chunk

Differs from model_gated.py in: GPTConfig, RMSNorm, rope_cos_sin, apply_rope, Block, KVCache, GPT.init_weights,
GPT.forward, recurrent_delta_rule, chunked_delta_rule, GatedDelta, unit
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # GPT-2's 50,257 tokens rounded up to a multiple of 64: faster matmuls
    block_size: int = 1024  # the longest sequence
    n_layer: int = 12
    n_head: int = 12  # query heads
    n_kv_head: int = 4  # key/value heads: n_head is MHA, 1 is MQA, between is GQA
    head_dim: int = 64  # n_head * head_dim need not be n_embd
    n_embd: int = 768
    n_inner: int = 2048  # width of the MLP, about 8/3 n_embd
    qk_norm: bool = True  # RMSNorm on each query and key head: attention logits stay small at high learning rates
    layer_pattern: str = "ddda"  # a full attention, d delta rule; repeated and cut to n_layer letters
    n_key_head: int = 3  # query and key heads of a delta layer
    n_value_head: int = 6  # its value heads, each with a state; a multiple of n_key_head
    key_dim: int = 128  # rows of a state: how many keys it can tell apart
    value_dim: int = 128  # columns of a state
    conv_kernel: int = 4  # tokens that the convolution before the delta rule sees
    output_gate: Literal["none", "head", "element"] = "element"  # one gate a head, or one for each of its elements
    gate_activation: Literal["sigmoid", "softplus"] = "sigmoid"  # of the output gate; softplus can amplify too
    qkv_gates: str = ""  # what else has a sigmoid gate per element: "v" the values, "qkv" queries, keys and values
    rotary_fraction: float = 0.25  # of head_dim that RoPE turns; the rest matches by content at any distance
    rope_theta: float = 10000.0  # wavelengths reach 2 pi rope_theta tokens: 1e6 for long context
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"  # turns more slowly, to read longer texts
    rope_factor: float = 1.0  # how much more slowly: 4.0 for a block_size of 4 times the trained length
    rope_original: int = 0  # the trained length, which yarn and llama3 need
    norm_eps: float = 1e-6
    tie_embeddings: bool = True  # the head is the embedding transposed
    scale_embeddings: bool = False  # multiply embeddings by sqrt(n_embd)
    logit_softcap: float = 0.0  # c > 0: logits become c * tanh(logits / c)
    dropout: float = 0.0  # on the output of each branch: for many epochs over little data
    init_std: float = 0.02  # std of every weight matrix; wo and w_down use init_std / sqrt(2 n_layer)
    zero_init_residual: bool = False  # wo and w_down start at 0, so that every block starts as the identity
    eot_id: int = -1  # the token that begins a document: no token sees an earlier document; -1: all is one document

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: try 1 or n_head")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, and RoPE turns pairs: try {self.head_dim + 1}")
        rotary_dim = self.head_dim * self.rotary_fraction
        if rotary_dim not in range(2, self.head_dim + 1, 2):
            numbers = f"{rotary_dim:g} of head_dim={self.head_dim} numbers"
            raise ValueError(f"rotary_fraction={self.rotary_fraction} turns {numbers}, which are not pairs: try 1.0")
        elsewhere = dict(
            l="local attention",
            n="full attention without positions",
            m="local attention without positions",
            s="a state space layer",
            k="linear attention",
        )
        for letter in self.layer_pattern:
            if letter not in "ad":
                meaning = elsewhere.get(letter, "no kind of layer")
                raise ValueError(f"layer_pattern={self.layer_pattern!r}: {letter} is {meaning}: try letters a and d")
        if not self.layer_pattern:
            raise ValueError("layer_pattern='' says nothing: try ddda")
        self.layer_pattern = (self.layer_pattern * self.n_layer)[: self.n_layer]
        if self.n_value_head % self.n_key_head:
            raise ValueError(f"n_value_head={self.n_value_head} is not a multiple of n_key_head={self.n_key_head}")
        if self.output_gate not in ("none", "head", "element"):
            raise ValueError(f"output_gate={self.output_gate!r} is unknown: try none, head or element")
        if self.gate_activation not in ("sigmoid", "softplus"):
            raise ValueError(f"gate_activation={self.gate_activation!r} is unknown: try sigmoid or softplus")
        if self.qkv_gates.strip("qkv"):
            raise ValueError(f"qkv_gates={self.qkv_gates!r} is unknown: try letters of qkv, or none")
        if self.rope_scaling not in ("none", "linear", "yarn", "llama3"):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} is unknown: try none, linear, yarn or llama3")
        if self.rope_scaling in ("yarn", "llama3") and self.rope_original < 1:
            needs = f"{self.rope_scaling} needs the trained length"
            raise ValueError(f"rope_original={self.rope_original}, and {needs}: try 4096")


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last dimension (https://arxiv.org/abs/1910.07467), as Qwen3-Next stores it."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        # In bf16 a weight below 1/256 would be lost beside the 1.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), x.shape[-1:], 1 + self.weight.to(wide), self.eps)
        return y.to(x.dtype)


def rope_cos_sin(positions, config):
    """Returns cos and sin in fp32 of the angles position * theta^(-2i/D), one for each pair i of a head.

    positions (T,) or (B, T) -> (T, 1, D/2) or (B, T, 1, D/2); the 1 stands for all heads.
    """
    D = int(config.head_dim * config.rotary_fraction)  # here the part that turns
    i = torch.arange(D // 2, device=positions.device).float()
    inv_freq = 1.0 / config.rope_theta ** (2 * i / D)  # (D/2,)
    magnitude = 1.0
    if config.rope_scaling == "linear":
        inv_freq = inv_freq / config.rope_factor
    elif config.rope_scaling == "yarn":
        inv_freq, magnitude = yarn(inv_freq, config)
    elif config.rope_scaling == "llama3":
        inv_freq = llama3(inv_freq, config)
    angle = positions[..., None, None].float() * inv_freq
    return angle.cos() * magnitude, angle.sin() * magnitude


def yarn(inv_freq, config):
    """Returns lower frequencies (D/2,) and the factor of cos and sin (https://arxiv.org/abs/2309.00071, section 3).

    Pairs that turn more than 32 times within the trained length keep their frequency, those that turn less than once
    have it divided by rope_factor, and from pair to pair in between the blend of the two moves linearly.
    """
    D = 2 * len(inv_freq)

    def pair_that_turns(n):
        """Returns the i, a fraction, whose angle rope_original * theta^(-2i/D) is n full turns, 2 pi n."""
        return D * math.log(config.rope_original / (2 * math.pi * n)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(32)), 0)
    high = min(math.ceil(pair_that_turns(1)), D - 1)  # the authors' bound, although i ends at D/2 - 1
    i = torch.arange(D // 2, device=inv_freq.device).float()
    share = ((i - low) / max(high - low, 0.001)).clamp(0, 1)  # (D/2,), of the lower frequency; never 0 / 0
    inv_freq = inv_freq * (1 - share) + inv_freq / config.rope_factor * share
    # Over a longer context attention spreads: larger logits sharpen it again. Scores grow by the square of this.
    magnitude = 0.1 * math.log(max(config.rope_factor, 1.0)) + 1.0
    return inv_freq, magnitude


def llama3(inv_freq, config):
    """Returns lower frequencies (D/2,) as in Llama 3.1 (https://arxiv.org/abs/2407.21783).

    Pairs that turn more than 4 times within the trained length keep their frequency, those that turn less than once
    have it divided by rope_factor, and in between the blend of the two moves linearly with the number of turns.
    """
    turns = config.rope_original * inv_freq / (2 * math.pi)  # (D/2,)
    share = ((4 - turns) / (4 - 1)).clamp(0, 1)  # (D/2,), of the lower frequency
    return inv_freq * (1 - share) + inv_freq / config.rope_factor * share


def apply_rope(x, cos, sin):
    """Turns the first numbers of each head of x (B, T, H, D) by their angles (https://arxiv.org/abs/2104.09864).

    Of D = 8 numbers with rotary_fraction 0.5 the pairs (x_0, x_2) and (x_1, x_3) turn, and x_4 to x_7 stay.
    """
    half = cos.size(-1)
    x1, x2, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        D = config.head_dim
        self.layer = layer
        self.head_dim = D
        self.wq = nn.Linear(C, config.n_head * D, bias=False)
        self.wk = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wv = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wo = nn.Linear(config.n_head * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.wq_gate = None
        self.wk_gate = None
        self.wv_gate = None
        self.wo_gate = None
        if "q" in config.qkv_gates:
            self.wq_gate = nn.Linear(C, config.n_head * D, bias=False)
        if "k" in config.qkv_gates:
            self.wk_gate = nn.Linear(C, config.n_kv_head * D, bias=False)
        if "v" in config.qkv_gates:
            self.wv_gate = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.gate_activation = torch.sigmoid
        if config.gate_activation == "softplus":
            self.gate_activation = F.softplus
        if config.output_gate == "head":
            self.wo_gate = nn.Linear(C, config.n_head, bias=False)
        elif config.output_gate == "element":
            self.wo_gate = nn.Linear(C, config.n_head * D, bias=False)

    def forward(self, x, rope, mask=None, cache=None):
        """Returns (B, T, C) for x (B, T, C); rope is (cos, sin), mask as GPT.positions_and_mask returns it."""
        B, T, _ = x.shape
        # 1. project; -1 counts the heads, of which a device has a share where tensor parallelism splits them
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        # 2. norm, then gate: a norm behind the gates would bring a closed head back to full size
        q = self.q_norm(q)
        k = self.k_norm(k)
        if self.wq_gate is not None:
            q = q * self.wq_gate(x).view_as(q).sigmoid()
        if self.wk_gate is not None:
            k = k * self.wk_gate(x).view_as(k).sigmoid()
        if self.wv_gate is not None:
            v = v * self.wv_gate(x).view_as(v).sigmoid()
        q, k = self.rotate(q, k, rope)
        # 3. attend, heads before time
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)  # (B, G, T, D)
        v = v.transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        y = self.attend(q, k, v, mask).transpose(1, 2)  # (B, T, H, D)
        # 4. gate each head, or each of its elements
        if self.wo_gate is not None:
            gate = self.wo_gate(x).view(B, T, y.size(2), -1)  # (B, T, H, 1 or D)
            y = y * self.gate_activation(gate)
        # 5. merge the heads
        return self.wo(y.reshape(B, T, -1))  # (B, T, C)

    def rotate(self, q, k, rope):
        """Returns q (B, T, H, D) and k (B, T, G, D), each head turned by its position."""
        q = apply_rope(q, *rope)
        k = apply_rope(k, *rope)
        return q, k

    def attend(self, q, k, v, mask):
        """Returns softmax attention (B, H, T, D) of q (B, H, T, D) to k, v (B, G, S, D); H / G heads share a key."""
        causal = False
        if mask is None and q.size(2) > 1:  # S = T here; a single query sees all S keys
            causal = True
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


def recurrent_delta_rule(q, k, v, log_decay, beta, first, state):
    """Returns the output (B, Hv, 1, Dv) of one token and the state after it (B, Hv, Dk, Dv).

    The inputs are those of chunked_delta_rule with T = 1.
    """
    decay = log_decay.exp() * ~first  # (B, Hv, 1), 0 where a document begins
    state = state * decay[..., None]
    answer = k @ state  # (B, Hv, 1, Dv)
    written = (v - answer) * beta[..., None]
    state = state + k.mT @ written  # the outer product of k and what is written
    return q @ state, state


def chunked_delta_rule(q, k, v, log_decay, beta, first, state, chunk=64):
    """Returns the outputs (B, Hv, T, Dv) of T tokens and the state after them, by matmuls.

    This is section 3.3 of https://arxiv.org/abs/2412.06464. q, k (B, Hv, T, Dk), v (B, Hv, T, Dv), log_decay, beta
    (B, Hv, T), first (B or 1, 1, T): does a document begin here? state (B, Hv, Dk, Dv): M before these tokens.
    A chunk of 2 tokens after the state M, with their decays d1 and d2, writes e1 and e2:
        e1 = beta1 (v1 - d1 M^T k1)                             y1 = d1 M^T q1 + (q1 . k1) e1
        e2 = beta2 (v2 - d2 d1 M^T k2 - d2 (k2 . k1) e1)        y2 = d2 d1 M^T q2 + d2 (q2 . k1) e1 + (q2 . k2) e2
    and leaves d2 d1 M + d2 k1 e1^T + k2 e2^T. Only M has to come from the chunk before.
    """
    # 1. cut into N chunks of L tokens; the padding at the right writes nothing and decays nothing
    T = q.size(2)
    L = chunk
    if T < chunk:  # min(chunk, T) would stay a symbol in the graphs of torch.compile
        L = T
    missing = -T % L
    q = F.pad(q, (0, 0, 0, missing)).unflatten(2, (-1, L))  # (B, Hv, N, L, Dk)
    k = F.pad(k, (0, 0, 0, missing)).unflatten(2, (-1, L))  # (B, Hv, N, L, Dk)
    v = F.pad(v, (0, 0, 0, missing)).unflatten(2, (-1, L))  # (B, Hv, N, L, Dv)
    log_decay = F.pad(log_decay, (0, missing)).unflatten(2, (-1, L))  # (B, Hv, N, L)
    beta = F.pad(beta, (0, missing)).unflatten(2, (-1, L))[..., None]  # (B, Hv, N, L, 1)
    first = F.pad(first, (0, missing)).unflatten(2, (-1, L))  # (B or 1, 1, N, L)

    # 2. decay[i, j]: how much is left at i of what j wrote; 0 is the state before the chunk, 1 its first token:
    #     1
    #     d1     1
    #     d2 d1  d2  1
    # Each entry sums its own steps, as -inf comes where a decay is 0: a difference of running sums would be NaN there.
    log_decay = F.pad(log_decay, (1, 0))  # (B, Hv, N, L + 1)
    later = torch.ones(L + 1, L + 1, dtype=torch.bool, device=q.device).tril(-1)  # i > j
    decay = torch.where(later, log_decay[..., None], 0.0).cumsum(dim=-2).exp()  # (B, Hv, N, L + 1, L + 1)
    document = F.pad(first, (1, 0)).cumsum(dim=-1)  # (B or 1, 1, N, L + 1)
    same = document[..., :, None] == document[..., None, :]
    decay = decay * same.tril()
    state_kept = decay[..., 1:, :1]  # (B, Hv, N, L, 1), of the state at each token
    tokens_kept = decay[..., 1:, 1:]  # (B, Hv, N, L, L), of each token at each later one
    state_kept_at_end = decay[..., -1:, :1]  # (B, Hv, N, 1, 1)
    tokens_kept_at_end = decay[..., -1, 1:, None]  # (B, Hv, N, L, 1)

    # 3. what is written (the e of the example) depends on what was before: (1 + A) written = beta (v - state_kept k M),
    # with what A has below its diagonal: unitriangular reads no more of it, and takes 1 on the diagonal. The solution
    # is u - w M, and u and w need no M: all chunks are solved at once.
    A = (k @ k.mT) * tokens_kept * beta  # (B, Hv, N, L, L)
    right = torch.cat((v, k * state_kept), dim=-1) * beta  # (B, Hv, N, L, Dv + Dk)
    solved = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
    u, w = solved.tensor_split((v.size(-1),), dim=-1)  # (B, Hv, N, L, Dv), (B, Hv, N, L, Dk)

    # 4. go from chunk to chunk
    scores = (q @ k.mT) * tokens_kept  # (B, Hv, N, L, L)
    q_to_state = q * state_kept
    k_to_end = k * tokens_kept_at_end
    y = []
    for n in range(q.size(2)):
        written = u[:, :, n] - w[:, :, n] @ state  # (B, Hv, L, Dv)
        y.append(q_to_state[:, :, n] @ state + scores[:, :, n] @ written)
        state = state * state_kept_at_end[:, :, n] + k_to_end[:, :, n].mT @ written
    return torch.cat(y, dim=2)[:, :, :T], state


class GatedDelta(nn.Module):
    """Projections and a short convolution, the delta rule, a gated norm (https://arxiv.org/abs/2412.06464)."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        key_width = config.n_key_head * config.key_dim
        value_width = config.n_value_head * config.value_dim
        channels = 2 * key_width + value_width  # of q, k and v
        self.layer = layer
        self.key_dim = config.key_dim
        self.value_dim = config.value_dim
        self.norm_eps = config.norm_eps
        self.wq = nn.Linear(C, key_width, bias=False)
        self.wk = nn.Linear(C, key_width, bias=False)
        self.wv = nn.Linear(C, value_width, bias=False)
        self.wz = nn.Linear(C, value_width, bias=False)
        self.wb = nn.Linear(C, config.n_value_head, bias=False)
        self.wa = nn.Linear(C, config.n_value_head, bias=False)
        # Only its weight is used: F.conv1d cannot leave out what another document had.
        self.conv = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.n_value_head))
        self.dt_bias = nn.Parameter(torch.empty(config.n_value_head))
        self.o_norm = nn.Parameter(torch.empty(config.value_dim))
        self.wo = nn.Linear(value_width, C, bias=False)

    def forward(self, x, positions, cache=None):
        B, T, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)  # a state adds up thousands of tokens

        # 1. project
        q = self.wq(x)  # (B, T, Hk * Dk)
        k = self.wk(x)  # (B, T, Hk * Dk)
        v = self.wv(x)  # (B, T, Hv * Dv)
        z = self.wz(x)  # (B, T, Hv * Dv)
        b = self.wb(x).to(wide)  # (B, T, Hv)
        a = self.wa(x).to(wide)  # (B, T, Hv)

        # 2. convolve q, k and v; the tail is what came in before these tokens
        qkv = torch.cat((q, k, v), dim=-1)  # (B, T, channels)
        if cache is None:
            state = qkv.new_zeros(B, b.size(-1), self.key_dim, self.value_dim, dtype=wide)
            tail = qkv.new_zeros(B, self.conv.kernel_size[0] - 1, qkv.size(-1))
        else:
            state, tail = cache.read_state(self.layer)
        inputs = torch.cat((tail, qkv), dim=1)  # (B, K - 1 + T, channels)
        qkv = F.silu(self.convolve(inputs, positions))
        q, k, v = qkv.split((q.size(-1), k.size(-1), v.size(-1)), dim=-1)

        # 3. heads, as many as there are value heads: keys of length 1, queries of length 1 / sqrt(Dk)
        q = unit(q.view(B, T, -1, self.key_dim)) * self.key_dim**-0.5  # (B, T, Hk, Dk)
        k = unit(k.view(B, T, -1, self.key_dim))  # (B, T, Hk, Dk)
        v = v.view(B, T, -1, self.value_dim)  # (B, T, Hv, Dv)
        per_key_head = v.size(2) // k.size(2)
        q = q.repeat_interleave(per_key_head, dim=2)  # (B, T, Hv, Dk)
        k = k.repeat_interleave(per_key_head, dim=2)  # (B, T, Hv, Dk)

        # 4. the delta rule, heads before time
        beta = b.sigmoid()
        # logsigmoid(-y) is -softplus(y), whose gradient fails under torch.compile with the backend aot_eager
        log_decay = self.A_log.to(wide).exp() * F.logsigmoid(-(a + self.dt_bias))  # (B, T, Hv)
        first = positions.view(-1, 1, T) == 0  # (B or 1, 1, T)
        device_type = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
        with torch.autocast(device_type, enabled=False):
            y, state = self.delta_rule(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                log_decay.transpose(1, 2), beta.transpose(1, 2), first, state,
            )  # fmt: skip
        if cache is not None:
            cache.write_state(self.layer, state, inputs[:, T:])

        # 5. norm each head, gate, project
        y = F.rms_norm(y.transpose(1, 2), (self.value_dim,), eps=self.norm_eps) * self.o_norm  # (B, T, Hv, Dv)
        y = y * F.silu(z.view_as(y).to(wide))
        return self.wo(y.flatten(2).to(x.dtype))  # (B, T, C)

    def convolve(self, x, positions):
        """Returns each channel of x (B, K - 1 + T, channels) summed over K taps, for the last T tokens, in fp32.

        A tap that would reach into another document sees 0 there. Of K = 4 taps the first looks back by 3 tokens, and
        the last at the token itself: at position 1 of a document the first two see 0.
        """
        T = positions.size(-1)
        K = self.conv.kernel_size[0]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        y = torch.zeros_like(x[:, :T])
        for i in range(K):
            inside = positions >= K - 1 - i  # (B, T) or (T,): tap i looks back by K - 1 - i tokens
            y = y + x[:, i : i + T] * (self.conv.weight[:, 0, i] * inside[..., None])
        return y

    def delta_rule(self, q, k, v, log_decay, beta, first, state):
        """Returns the outputs (B, Hv, T, Dv) and the last state; inputs as in chunked_delta_rule."""
        if q.size(2) == 1:
            return recurrent_delta_rule(q, k, v, log_decay, beta, first, state)
        return chunked_delta_rule(q, k, v, log_decay, beta, first, state)


def unit(x):
    """Returns x / sqrt(|x|^2 + 1e-6) of vectors x (..., Dk): length 1, but less where x is shorter than about 0.01."""
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.w_gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.w_up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.w_down = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        kind = config.layer_pattern[layer]
        nth = config.layer_pattern[:layer].count(kind)  # the cache counts attention and delta layers apart
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, nth) if kind == "a" else None
        self.delta = GatedDelta(config, nth) if kind == "d" else None
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, rope, mask=None, cache=None):
        u = self.attn_norm(x)
        if self.attn is not None:
            y = self.attn(u, rope, mask, cache)
        else:
            y = self.delta(u, positions, cache)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class KVCache:
    """What layers keep of the tokens so far, in buffers made once: attention k[layer] and v[layer] (B, G, max_len, D).

    A delta layer keeps the same at any length: state[layer] (B, Hv, Dk, Dv), and tail[layer] (B, K - 1, channels), the
    last inputs of its convolution. Attention and delta layers are counted apart.

    A forward pass calls advance once, which takes places for its tokens; then each layer appends what belongs there.
    doc_start (B, max_len) holds for each place the place where its document begins; tokens see each other where it is
    equal. Padding at the left is a document of its own. Two rows, the second with pad=1; E is eot_id, - is padding:
        tokens       a b E c    - a b c
        doc_start    0 0 2 2    0 1 1 1
        position     0 1 0 1    0 0 1 2    place - doc_start
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=torch.float32):
        n_attention = config.layer_pattern.count("a")
        n_delta = config.layer_pattern.count("d")
        shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_attention)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_attention)]
        wide = torch.promote_types(dtype, torch.float32)
        state_shape = (batch_size, config.n_value_head, config.key_dim, config.value_dim)
        self.state = [torch.zeros(state_shape, device=device, dtype=wide) for _ in range(n_delta)]
        channels = 2 * config.n_key_head * config.key_dim + config.n_value_head * config.value_dim
        tail_shape = (batch_size, config.conv_kernel - 1, channels)
        self.tail = [torch.zeros(tail_shape, device=device, dtype=dtype) for _ in range(n_delta)]
        self.max_len = max_len
        self.static = static
        self.length = 0
        if static:  # a number would be compiled into a step, and every length compiled anew
            self.length = torch.zeros((), dtype=torch.long, device=device)
        self.places = torch.arange(max_len, device=device)
        self.eot_id = config.eot_id
        self.has_documents = config.eot_id >= 0 or pad is not None
        self.pad = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        if pad is not None:
            self.pad = self.pad + pad[:, None]
        self.doc_start = torch.zeros(batch_size, max_len, dtype=torch.long, device=device)

    def advance(self, idx):
        """Takes the next places for idx (B, T); returns positions and mask as GPT.positions_and_mask describes them."""
        B, T = idx.shape
        first = not self.static and self.length == 0
        # A static length stands on the device, and to look at it would wait for all work there: its caller counts.
        too_long = not self.static and self.length + T > self.max_len
        if B != len(self.pad) or too_long:
            size = (len(self.pad), self.max_len)
            raise ValueError(f"{B} x ({int(self.length)} + {T}) tokens do not fit a cache of {size}")
        self.length += T
        place = self.last_places(T)  # (T,)
        # The first tokens attend by is_causal, whose first query sees key 0 alone; a single query sees every key.
        needs_no_mask = first or T == 1
        if needs_no_mask and not self.has_documents and not self.static:
            return place, None
        causal = self.places[: self.n_keys()] <= place[:, None]  # (T, S)
        if not self.has_documents:
            return place, causal
        # Where a token's document begins is the last of three: its own place if it is eot_id, the first place after the
        # padding, and where the document of the token before it begins. An empty cache says 0 at place 0.
        at_eot = torch.where(idx == self.eot_id, place, 0)  # (B, T)
        behind_padding = torch.where(place < self.pad, 0, self.pad)  # (B, T)
        previous = (place[:1] - 1).clamp(min=0)  # (1,), a tensor since a static length is one
        before = self.doc_start.index_select(1, previous)  # (B, 1)
        doc_start = torch.maximum(torch.maximum(at_eot, behind_padding), before).cummax(dim=1).values  # (B, T)
        self.doc_start.index_copy_(1, place, doc_start)
        same = doc_start[:, :, None] == self.doc_start[:, None, : self.n_keys()]  # (B, T, S)
        return place - doc_start, (same & causal)[:, None]  # (B, T), (B, 1, T, S)

    def append(self, layer, k, v):
        """Writes k, v (B, G, T, D) at the places of the newest tokens; returns those of all so far, (B, G, S, D)."""
        place = self.last_places(k.size(2))
        self.k[layer].index_copy_(2, place, k.type_as(self.k[layer]))
        self.v[layer].index_copy_(2, place, v.type_as(self.v[layer]))
        S = self.n_keys()
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]

    def read_state(self, layer):
        return self.state[layer], self.tail[layer]

    def write_state(self, layer, state, tail):
        self.state[layer].copy_(state)
        self.tail[layer].copy_(tail)

    def last_places(self, T):
        """Returns the places (T,) of the newest T tokens."""
        if self.static:
            return self.length - T + self.places[:T]
        return self.places[self.length - T : self.length]

    def n_keys(self):
        """Returns S: a static cache shows all its places at every length, and the mask hides those not yet taken."""
        return self.max_len if self.static else self.length

    def rewind(self, length):
        """Forgets all tokens but the first `length`; a state can only forget all."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {int(self.length)} tokens cannot be rewound to {length}")
        if self.state and 0 < length < self.length:
            raise ValueError(f"the state of {int(self.length)} tokens cannot be rewound to {length}: only to 0")
        if length == 0:
            for x in self.state + self.tail:
                x.zero_()
        if self.static:
            self.length.fill_(length)
        else:
            self.length = length

    def branch(self, n):
        """Returns a copy with every sequence repeated n times, to sample n continuations of one prompt."""
        new = copy.copy(self)
        new.k = [k.repeat_interleave(n, dim=0) for k in self.k]
        new.v = [v.repeat_interleave(n, dim=0) for v in self.v]
        new.state = [state.repeat_interleave(n, dim=0) for state in self.state]
        new.tail = [tail.repeat_interleave(n, dim=0) for tail in self.tail]
        new.pad = self.pad.repeat_interleave(n, dim=0)
        new.doc_start = self.doc_start.repeat_interleave(n, dim=0)
        new.length = self.length + 0  # a tensor of its own where it is one
        return new

    def bytes_per_token(self):
        return sum(x.nbytes for x in self.k + self.v) // self.doc_start.numel()

    def state_bytes(self):
        """Returns the bytes of a sequence's states, which do not grow with its length."""
        return sum(x.nbytes for x in self.state + self.tail) // len(self.doc_start)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None  # tied: logits() takes the embedding
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Sets every parameter; raises on one that it does not know, so that a new weight says how it begins."""
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.n_layer)  # 2 n_layer branches add up in the residual stream
        if self.config.zero_init_residual:
            residual_std = 0.0
        for name, p in self.named_parameters():
            kind = name.removesuffix(".weight").split(".")[-1]  # wq of blocks.0.attn.wq.weight
            if kind == "o_norm":
                p.fill_(1.0)
            elif kind.endswith("norm"):
                p.fill_(0.0)  # RMSNorm adds 1
            elif kind == "A_log":
                p.uniform_(0.01, 16).log_()
            elif kind == "dt_bias":
                # softplus(dt_bias) is log-uniform in 0.001 to 0.1 (expm1 and log undo softplus): half of the heads keep
                # 94 % or more at each token.
                p.uniform_(math.log(1e-3), math.log(0.1)).exp_().expm1_().log_()
            elif kind == "conv":
                bound = self.config.conv_kernel**-0.5
                p.uniform_(-bound, bound)
            elif kind in ("wo", "w_down"):
                p.normal_(0.0, residual_std)
            elif kind in ("embed", "lm_head", "wq", "wk", "wv", "w_gate", "w_up"):
                p.normal_(0.0, std)
            elif kind in ("wq_gate", "wk_gate", "wv_gate", "wo_gate", "wz", "wb", "wa"):
                p.normal_(0.0, std)
            else:
                raise ValueError(f"init_weights does not know {name}: say how it begins")

    def forward(self, idx, targets=None, cache=None, last_only=False, per_token=False):
        """Returns the logits (B, T, V) of idx (B, T), or with targets (B, T) the mean loss; targets of -1 are ignored.

        A cache holds the tokens before idx, and takes up idx. last_only: logits (B, 1, V) of the last token.
        per_token: (negative log-probability of each target (B, T), 0 where ignored; the auxiliary loss, such as that
        which balances experts: here 0).
        """
        positions, mask = self.positions_and_mask(idx, cache)
        rope = rope_cos_sin(positions, self.config)
        x = self.embed(idx)  # (B, T, C)
        if self.config.scale_embeddings:
            x = x * self.config.n_embd**0.5
        for block in self.blocks:
            x = block(x, positions, rope, mask, cache)
        if last_only:
            x = x[:, -1:]
        x = self.norm(x)
        if targets is None:
            return self.logits(x)
        if per_token:
            return self.token_losses(x, targets), torch.zeros((), device=x.device)
        return self.lm_loss(x, targets)

    def positions_and_mask(self, idx, cache=None):
        """Returns each token's position in its document, (T,) or (B, T), and a mask, True where a query sees a key.

        None instead of a mask is faster: every token sees itself and all before it. Else it is (T, S) or (B, 1, T, S).
        A cache takes places for idx here, before the layers append to it. Documents begin at eot_id, for example 9:
            idx 9 5 9 7  ->  doc_start 0 0 2 2  ->  positions 0 1 0 1;  the last token sees the last two
        """
        if cache is not None:
            return cache.advance(idx)
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}: give fewer")
        place = torch.arange(T, device=idx.device)
        if self.config.eot_id < 0:
            return place, None
        doc_start = torch.where(idx == self.config.eot_id, place, 0).cummax(dim=1).values  # (B, T)
        same = doc_start[:, :, None] == doc_start[:, None, :]  # (B, T, T)
        causal = place <= place[:, None]  # (T, T)
        return place - doc_start, (same & causal)[:, None]  # (B, T), (B, 1, T, T)

    def logits(self, x):
        """Returns the scores (..., V) of all tokens for hidden states x (..., C)."""
        if self.lm_head is None:
            logits = F.linear(x, self.embed.weight)
        else:
            logits = self.lm_head(x)
        cap = self.config.logit_softcap
        if cap > 0:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def lm_loss(self, x, targets):
        """Returns the mean cross-entropy in fp32 of hidden states x (B, T, C) for targets (B, T); keeps all logits."""
        return F.cross_entropy(self.logits(x).flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def token_losses(self, x, targets):
        """Returns the cross-entropy of each token (B, T) in fp32, and keeps no logits: chunks are computed twice.

        What fine-tuning wants: at 151,936 ids the fp32 logits of 8 x 2,048 tokens take 10 GB.
        """

        def chunk_losses(x, targets):
            return F.cross_entropy(self.logits(x).float(), targets, ignore_index=-1, reduction="none")

        losses = []
        for rows, wanted in zip(x.flatten(0, 1).split(1024), targets.flatten().split(1024)):
            losses.append(checkpoint(chunk_losses, rows, wanted, use_reentrant=False))
        return torch.cat(losses).view_as(targets)

    def new_cache(self, batch_size, max_len, pad=None, static=False):
        """Returns an empty cache for max_len tokens a row, of which the first pad (B,) are padding.

        static: shapes never depend on the length, so that one compiled step serves every token. Its caller sees to it
        that no more than max_len tokens come.
        """
        if max_len > self.config.block_size:
            raise ValueError(f"max_len={max_len} is more than block_size={self.config.block_size}: give less")
        weight = self.embed.weight
        return KVCache(self.config, batch_size, max_len, pad, static, weight.device, weight.dtype)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0):
        """Returns idx (B, T) continued by max_new_tokens ids; temperature=0 is greedy, top_k=0 draws from all ids.

        When block_size is full, each further token is predicted from the last block_size ones in a new cache, since
        they all stand at other positions. Call eval() before if there is dropout.
        """
        max_len = min(idx.size(1) + max_new_tokens, self.config.block_size)
        cache = None
        for _ in range(max_new_tokens):
            if cache is None or cache.length == self.config.block_size:
                cache = self.new_cache(len(idx), max_len)
            new = idx[:, cache.length :][:, -max_len:]
            logits = self(new, cache=cache, last_only=True)[:, -1].float()  # (B, V)
            if top_k > 0:
                least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            token = logits.argmax(dim=-1, keepdim=True)
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
            idx = torch.cat((idx, token), dim=1)
        return idx


TINY = dict(
    vocab_size=256, block_size=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=64, n_inner=160,
    layer_pattern="da", n_key_head=2, n_value_head=4, key_dim=16, value_dim=12,
)  # fmt: skip

if __name__ == "__main__":  # learns one batch by heart in 20 steps, then continues its first tokens
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    batch = torch.randint(model.config.vocab_size, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{model.new_cache(1, 8).bytes_per_token()} cache bytes per token")
    continued = model.generate(batch[:1, :8], 8, temperature=0)[0, 8:]
    print(f"greedy {continued.tolist()} of {batch[0, 8:16].tolist()}")
