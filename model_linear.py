"""Most layers sum keys and values into a matrix of fixed size, without softmax: linear attention in three forms.

    q, k, v = Wq u, Wk u, Wv u                                                  u = RMSNorm(x)
    M = decay M + k v^T;  y = M^T q                attention whose weights are q . k, faded by the decays since k
    none      elu(q) + 1, elu(k) + 1; decay 1                   x = x + Wo (y / sum of q . k)
    head      silu(q), silu(k), silu(v); decay e^-slope         x = x + Wo (sigmoid(Wz u) * RMSNorm(y))
    channel   decay sigmoid(Wa u)^(1/16)                        x = x + Wo (silu(Wz u) * RMSNorm(y))

none is https://arxiv.org/abs/2006.16236; head the lightning attention of https://arxiv.org/abs/2501.08313, whose decay
is RetNet's (https://arxiv.org/abs/2307.08621); channel is GLA (https://arxiv.org/abs/2312.06635).

Without the softmax the sum over the past can be kept instead of the past: M has one size at every length, so a token
costs as much after 100,000 others as after 10. But D^2 numbers do not hold 100,000 keys. With a decay the old ones make
room: one number per head fades all of them at a fixed speed, one number per channel, a row of M, at a speed that each
token sets. A linear layer has no RoPE and no QK-norm: it knows positions by its decay, or without one by causality
alone. Where layer_pattern says a, a layer is the baseline's.

B  batch
T  time: the tokens of one call
S  time with the cached past
C  n_embd, the width of the residual stream
H  query heads; linear layers have as many keys and values
G  key/value heads of an attention layer
D  head_dim
V  vocabulary
M  state (D, D), the memory of one head
N  chunks
L  tokens of a chunk

Differs from model_baseline.py in: GPTConfig, Block, KVCache, GPT.init_weights, GPT.forward,
recurrent_linear_attention, linear_attention, in_chunks, decayed_scores, sum_behind, LinearAttention
As in model_hybrid.py: GPT.forward
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
    layer_pattern: str = "kkka"  # a full attention, k linear attention; repeated and cut to n_layer letters
    decay: Literal["none", "head", "channel"] = "channel"  # forget never, at fixed speeds, or as tokens say
    decay_rank: int = 16  # decay="channel": so many numbers of a token say how fast each channel forgets
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
        for letter in self.layer_pattern:
            if letter not in "ak":
                raise ValueError(
                    f"layer_pattern={self.layer_pattern!r}: {letter} is no layer here: try letters a and k"
                )
        if not self.layer_pattern:
            raise ValueError("layer_pattern='' says nothing: try kkka")
        self.layer_pattern = (self.layer_pattern * self.n_layer)[: self.n_layer]
        if self.decay not in ("none", "head", "channel"):
            raise ValueError(f"decay={self.decay!r} is unknown: try none, head or channel")
        if self.decay_rank < 1:
            raise ValueError(f"decay_rank={self.decay_rank}: decays are read from at least 1 number: try 16")
        if self.rope_scaling not in ("none", "linear", "yarn", "llama3"):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} is unknown: try none, linear, yarn or llama3")
        if self.rope_scaling in ("yarn", "llama3") and self.rope_original < 1:
            needs = f"{self.rope_scaling} needs the trained length"
            raise ValueError(f"rope_original={self.rope_original}, and {needs}: try 4096")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (https://arxiv.org/abs/1910.07467), in the dtype of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)  # in bf16 the norm would be rounded, and then the product
        y = F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.eps)
        return y.to(x.dtype)


def rope_cos_sin(positions, config):
    """Returns cos and sin in fp32 of the angles position * theta^(-2i/D), one for each pair i of a head.

    positions (T,) or (B, T) -> (T, 1, D/2) or (B, T, 1, D/2); the 1 stands for all heads.
    """
    D = config.head_dim
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
    """Turns the pairs (x_i, x_{i + D/2}) of x (B, T, H, D) by their angles (https://arxiv.org/abs/2104.09864)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


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

    def forward(self, x, rope, mask=None, cache=None):
        """Returns (B, T, C) for x (B, T, C); rope is (cos, sin), mask as GPT.positions_and_mask returns it."""
        B, T, _ = x.shape
        # 1. project; -1 counts the heads, of which a device has a share where tensor parallelism splits them
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        q, k = self.rotate(q, k, rope)
        # 2. attend, heads before time
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)  # (B, G, T, D)
        v = v.transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        # 3. merge the heads
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def rotate(self, q, k, rope):
        """Returns q (B, T, H, D) and k (B, T, G, D), each head normed (QK-norm) and turned by its position."""
        q = apply_rope(self.q_norm(q), *rope)
        k = apply_rope(self.k_norm(k), *rope)
        return q, k

    def attend(self, q, k, v, mask):
        """Returns softmax attention (B, H, T, D) of q (B, H, T, D) to k, v (B, G, S, D); H / G heads share a key."""
        causal = False
        if mask is None and q.size(2) > 1:  # S = T here; a single query sees all S keys
            causal = True
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


def recurrent_linear_attention(q, k, v, log_decay, first, state):
    """Returns the output (B, H, 1, Dv) of one token, T = 1, and the state after it; inputs as in linear_attention."""
    decay = log_decay.exp() * ~first[..., None]  # (B, H, 1, D or 1)
    state = state * decay.mT + k.mT @ v
    return q @ state, state


def linear_attention(q, k, v, log_decay, first, state, chunk=64):
    """Returns the outputs (B, H, T, Dv) of T tokens and the state after them (B, H, D, Dv), by matmuls.

    q, k (B, H, T, D), v (B, H, T, Dv), first (B or 1, 1, T): does a document begin here? state (B, H, D, Dv).
    log_decay is at most 0 and (B, H, T, D), where 1 in place of any size means the same for all.
    A chunk of 2 tokens after the state M, with their decays d1 and d2 of a head:
        y1 = d1 M^T q1 + (q1 . k1) v1
        y2 = d2 d1 M^T q2 + d2 (q2 . k1) v1 + (q2 . k2) v2
    and leaves d2 d1 M + d2 k1 v1^T + k2 v2^T. Only M has to come from the chunk before.
    """
    T = q.size(2)
    if T == 1:
        return recurrent_linear_attention(q, k, v, log_decay, first, state)

    # 1. cut into N chunks of L tokens; what fills up the last one writes nothing and decays nothing
    L = chunk  # a power of 2
    while L >= 2 * T:  # a short text would be zeros for the most part
        L = L // 2
    q = in_chunks(q, L)  # (B, H, N, L, D)
    k = in_chunks(k, L)  # (B, H, N, L, D)
    v = in_chunks(v, L)  # (B, H, N, L, Dv)
    log_decay = in_chunks(log_decay.expand(-1, -1, T, -1), L)  # (B, H, N, L, D)
    first = in_chunks(first[..., None], L)  # (B or 1, 1, N, L, 1)

    # 2. tokens of one document see each other; those of document 0, which began before the chunk, see the state too
    document = first.cumsum(dim=-2)  # (B or 1, 1, N, L, 1)
    same = document == document.mT  # (B or 1, 1, N, L, L)
    state_kept = log_decay.cumsum(dim=-2).exp() * (document == 0)  # (B, H, N, L, D), of the state at each token
    kept_at_end = sum_behind(log_decay).exp() * same[..., -1:]  # (B, H, N, L, D), of each token at the last one
    scores = decayed_scores(q, k, log_decay) * same.tril()  # (B, H, N, L, L)

    # 3. go from chunk to chunk
    written = (k * kept_at_end).mT @ v  # (B, H, N, D, Dv)
    states = []
    for n in range(q.size(2)):
        states.append(state)
        state = state * state_kept[:, :, n, -1:].mT + written[:, :, n]
    y = scores @ v + (q * state_kept) @ torch.stack(states, dim=2)  # (B, H, N, L, Dv)
    return y.flatten(2, 3)[:, :, :T], state


def in_chunks(x, L):
    """Returns x (B, H, T, D) as (B, H, N, L, D), filled up with zeros at the right."""
    T = x.size(2)
    N = (T + L - 1) // L
    return F.pad(x.contiguous(), (0, 0, 0, N * L - T)).view(x.size(0), x.size(1), N, L, x.size(3))


def decayed_scores(q, k, log_decay):
    """Returns scores (..., L, L): the sum over channels of q_i k_j and the decays from j + 1 to i; j > i is undefined.

    q, k (..., L, D), log_decay (..., L, D or 1). One decay for all channels is a factor of the score. With one in each
    they have to be on q and k before the product, and k_j divided by all decays up to j would be infinite where a
    channel forgets fast. So a late q carries the decays since the middle of the chunk, an early k those up to it, both
    of them at most 1, and each half is a shorter chunk. Of 4 tokens with decays d1 to d4:
        q3 d3        k1 d2
        q4 d4 d3     k2         (q4 d4 d3) . (k1 d2) has the decays of the tokens 2 to 4
    """
    L = q.size(-2)
    if log_decay.size(-1) == 1:
        later = torch.ones(L, L, dtype=torch.bool, device=q.device).tril(-1)  # i > j
        return q @ k.mT * torch.where(later, log_decay, 0.0).cumsum(dim=-2).exp()
    if L == 1:
        return q @ k.mT
    q = q.unflatten(-2, (2, -1))  # (..., 2, L / 2, D)
    k = k.unflatten(-2, (2, -1))
    log_decay = log_decay.unflatten(-2, (2, -1))
    inside = decayed_scores(q, k, log_decay)  # (..., 2, L / 2, L / 2)
    k1 = k[..., 0, :, :] * sum_behind(log_decay[..., 0, :, :]).exp()
    q2 = q[..., 1, :, :] * log_decay[..., 1, :, :].cumsum(dim=-2).exp()
    between = q2 @ k1.mT  # (..., L / 2, L / 2)
    top = torch.cat((inside[..., 0, :, :], torch.zeros_like(between)), dim=-1)
    bottom = torch.cat((between, inside[..., 1, :, :]), dim=-1)
    return torch.cat((top, bottom), dim=-2)


def sum_behind(x):
    """Returns for each token of x (..., L, D) the sum of those behind it: of a, b, c it is b + c, c, 0."""
    behind = F.pad(x[..., 1:, :], (0, 0, 0, 1))
    return behind.flip(-2).cumsum(dim=-2).flip(-2)


class LinearAttention(nn.Module):
    def __init__(self, config, layer, depth):
        super().__init__()
        C = config.n_embd
        D = config.head_dim
        width = config.n_head * D
        self.layer = layer
        self.depth = depth  # counts all blocks; layer counts those of this kind, as the cache does
        self.n_layer = config.n_layer
        self.decay = config.decay
        self.head_dim = D
        self.wq = nn.Linear(C, width, bias=False)
        self.wk = nn.Linear(C, width, bias=False)
        self.wv = nn.Linear(C, width, bias=False)
        self.wo = nn.Linear(width, C, bias=False)
        if config.decay != "none":
            self.wz = nn.Linear(C, width, bias=False)
        if config.decay == "head":
            self.o_norm = RMSNorm(width, config.norm_eps)
        if config.decay == "channel":
            self.wa_down = nn.Linear(C, config.decay_rank, bias=False)
            self.wa_up = nn.Linear(config.decay_rank, width)
            self.o_norm = RMSNorm(D, config.norm_eps)

    def forward(self, x, positions, cache=None):
        """Returns (B, T, C) for x (B, T, C) and positions (B, T) or (T,), of which 0 begins a document."""
        B, T, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)  # a state adds up thousands of tokens

        # 1. project; heads before time
        q = self.wq(x).view(B, T, -1, self.head_dim).transpose(1, 2).to(wide)  # (B, H, T, D)
        k = self.wk(x).view(B, T, -1, self.head_dim).transpose(1, 2).to(wide)  # (B, H, T, D)
        v = self.wv(x).view(B, T, -1, self.head_dim).transpose(1, 2).to(wide)  # (B, H, T, D)

        # 2. what becomes of them, and how much of the state each token leaves
        if self.decay == "none":
            q = F.elu(q) + 1
            k = F.elu(k) + 1
            v = F.pad(v, (0, 1), value=1.0)  # (B, H, T, D + 1); the sum of weights comes out of the last column
            log_decay = q.new_zeros(1, 1, 1, 1)
        elif self.decay == "head":
            q = F.silu(q)
            k = F.silu(k)
            v = F.silu(v)
            log_decay = self.fixed_log_decay(q)  # (1, H, 1, 1)
        else:
            a = self.wa_up(self.wa_down(x)).view(B, T, -1, self.head_dim).transpose(1, 2)
            log_decay = F.logsigmoid(a.to(wide)) / 16  # (B, H, T, D); a new model's decays are about 0.5^(1/16) = 0.96

        # 3. attend to what is in the state and to each other
        first = positions.view(-1, 1, T) == 0  # (B or 1, 1, T)
        if cache is None:
            state = q.new_zeros(B, q.size(1), self.head_dim, v.size(-1))
        else:
            state = cache.read_state(self.layer)
        device_type = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
        with torch.autocast(device_type, enabled=False):
            y, state = linear_attention(q, k, v, log_decay, first, state)
        if cache is not None:
            cache.write_state(self.layer, state)

        # 4. divide by the sum of weights, or norm and gate; merge the heads
        y = y.transpose(1, 2)  # (B, T, H, D or D + 1)
        if self.decay == "none":
            y = y[..., :-1] / y[..., -1:].clamp(min=1e-10)
            y = y.flatten(2)
        elif self.decay == "head":
            y = self.o_norm(y.flatten(2)) * self.wz(x).to(wide).sigmoid()
        else:
            y = self.o_norm(y).flatten(2) * F.silu(self.wz(x).to(wide))
        return self.wo(y.to(x.dtype))  # (B, T, C)

    def fixed_log_decay(self, q):
        """Returns log_decay (1, H, 1, 1) for q (B, H, T, D): with 8 heads of the first layer -1/2, -1/4, ... -1/256.

        The later a layer, the longer it remembers; in the last block of the model it would be nearly all.
        """
        H = q.size(1)
        h = torch.arange(1, H + 1, device=q.device).type_as(q)
        slope = 2 ** (-8 * h / H)  # those of ALiBi (https://arxiv.org/abs/2108.12409)
        share = self.depth / (self.n_layer - 1 + 1e-5)  # 0 in the first block, 1 in the last
        return -slope.view(1, H, 1, 1) * (1 - share + 1e-5)


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
        nth = config.layer_pattern[:layer].count(kind)  # the cache counts attention and linear layers apart
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, nth) if kind == "a" else None
        self.linear = LinearAttention(config, nth, layer) if kind == "k" else None
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, rope, mask=None, cache=None):
        u = self.attn_norm(x)
        if self.attn is not None:
            y = self.attn(u, rope, mask, cache)
        else:
            y = self.linear(u, positions, cache)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class KVCache:
    """What layers keep of the tokens so far, in buffers made once: attention k[layer] and v[layer] (B, G, max_len, D).

    A linear layer keeps state[layer] (B, H, D, D), of the same size at any length; with decay="none" a column more, for
    the sum of weights. Attention and linear layers are counted apart.

    A forward pass calls advance once, which takes places for its tokens; then each layer appends what belongs there.
    doc_start (B, max_len) holds for each place the place where its document begins; tokens see each other where it is
    equal. Padding at the left is a document of its own. Two rows, the second with pad=1; E is eot_id, - is padding:
        tokens       a b E c    - a b c
        doc_start    0 0 2 2    0 1 1 1
        position     0 1 0 1    0 0 1 2    place - doc_start
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=torch.float32):
        n_attention = config.layer_pattern.count("a")
        n_linear = config.layer_pattern.count("k")
        D = config.head_dim
        shape = (batch_size, config.n_kv_head, max_len, D)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_attention)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_attention)]
        wide = torch.promote_types(dtype, torch.float32)
        state_shape = (batch_size, config.n_head, D, D + (config.decay == "none"))
        self.state = [torch.zeros(state_shape, device=device, dtype=wide) for _ in range(n_linear)]
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
        return self.state[layer]

    def write_state(self, layer, state):
        self.state[layer].copy_(state)

    def last_places(self, T):
        """Returns the places (T,) of the newest T tokens."""
        if self.static:
            return self.length - T + self.places[:T]
        return self.places[self.length - T : self.length]

    def n_keys(self):
        """Returns S: a static cache shows all its places at every length, and the mask hides those not yet taken."""
        return self.max_len if self.static else self.length

    def rewind(self, length):
        """Forgets all tokens but the first `length`; a state only all, as it does at the first one of a document."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {int(self.length)} tokens cannot be rewound to {length}")
        if self.state and 0 < length < self.length:
            raise ValueError(f"the state of {int(self.length)} tokens cannot be rewound to {length}: only to 0")
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
        new.pad = self.pad.repeat_interleave(n, dim=0)
        new.doc_start = self.doc_start.repeat_interleave(n, dim=0)
        new.length = self.length + 0  # a tensor of its own where it is one
        return new

    def bytes_per_token(self):
        return sum(x.nbytes for x in self.k + self.v) // self.doc_start.numel()

    def state_bytes(self):
        """Returns the bytes of a sequence's states, which do not grow with its length."""
        return sum(x.nbytes for x in self.state) // len(self.doc_start)


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
            if kind.endswith("norm"):
                p.fill_(1.0)
            elif kind in ("wo", "w_down"):
                p.normal_(0.0, residual_std)
            elif kind in ("embed", "lm_head", "wq", "wk", "wv", "w_gate", "w_up"):
                p.normal_(0.0, std)
            elif kind in ("wz", "wa_down", "wa_up"):
                p.normal_(0.0, std)
            elif kind == "bias":
                p.zero_()
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
    layer_pattern="ka", decay_rank=8,
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
