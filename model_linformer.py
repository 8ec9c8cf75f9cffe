"""A causal Linformer: each window that has ended is pooled to a few slots (https://arxiv.org/abs/2006.04768).

    q, k, v = Wq u, Wk u, Wv u, then q, k = rope(norm(q)), rope(norm(k))        u = RMSNorm(x)
    ks, vs = Pk k, Pv v             of W tokens, Pk and Pv (R, W): the R slots of each window of a document
    x = x + Wo softmax(q [k; ks]^T / sqrt(D)) [v; vs]
        a query sees the keys of its own window up to itself, and the slots of all windows before
    x = x + Wdown (silu(Wgate u) * (Wup u))                                     u = RMSNorm(x)

Linformer itself multiplies all keys of a text by one Pk (R, T). Every slot then holds a part of every token, later ones
too: right for an encoder, but a decoder would read in the slots the token that it has to predict. Here only the windows
after it see a slot, as in DeepSeek-V4's heavily compressed attention, where a slot holds 128 tokens. Keys are turned
before they are pooled, so that a slot has no position of its own.

In place of T keys a query meets 2 W keys and R T / W slots: of 16,384 tokens with window=256 and n_slot=4 these are 512
and 256. Time is still quadratic in T, but in a part that is R / W of attention's. The cache has W keys and values, and
R of each window.

B  batch
T  time: the tokens of one call
S  keys and slots that a query meets: 2 W and M R
C  n_embd, the width of the residual stream
H  query heads
G  key/value heads
D  head_dim
W  window
R  n_slot, the slots of a window
Q  queries in a block: W, or T where that is less
N  blocks of queries in a call, ceil(T / W); as many windows are pooled, since no more can end in it
M  windows that have slots: N, or those of the cache
V  vocabulary

Differs from model_baseline.py in: GPTConfig, Attention, KVCache, GPT.init_weights, GPT.positions_and_mask,
window_starts, blocks_of, what_is_seen, query_blocks, key_blocks
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
    window: int = 256  # tokens that attend to each other as they are, counted from where their document begins
    n_slot: int = 4  # keys and values that stand for a window once it has ended; window of them begin as full attention
    qk_norm: bool = True  # RMSNorm on each query and key head: attention logits stay small at high learning rates
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
        if not 1 <= self.window <= self.block_size:
            raise ValueError(f"window={self.window} is not between 1 and block_size={self.block_size}: try a quarter")
        if self.n_slot < 1 or self.window % self.n_slot:
            raise ValueError(f"n_slot={self.n_slot} does not divide window={self.window}: try 1 or {self.window}")
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


def window_starts(place, doc_start, window):
    """Returns the place where the window of each token begins: windows are counted from where its document begins.

    With window 3 and documents that begin at 0 and 5; the second window is never whole, and its slots are never seen:
        place     0 1 2 3 4 5 6 7 8
        starts    0 0 0 3 3 5 5 5 8
    """
    return place - (place - doc_start) % window


def blocks_of(T, window):
    """Returns N and Q: T queries stand in N blocks of Q, each as long as a window, or in one if they are fewer."""
    if T < window:
        return 1, T
    return (T + window - 1) // window, window


def what_is_seen(place, doc_start, slot_start, config):
    """Returns the mask (B N, 1, Q, S) of queries at place (T,), in blocks as query_blocks and key_blocks make them.

    doc_start (B, T): where the document of each query begins. slot_start (B, M): where the window of each slot begins.
    With window 2, 1 slot and documents at 0 and 3, windows begin at 0, 2 (cut off by the document), 3 and 5:
        block of 4 and 5    keys 2 3 4 5    slots of 0 2 3
        query 4                  . x x .             . . .    its window began in the block before
        query 5                  . . . x             . . x
    """
    W = config.window
    T = len(place)
    N, Q = blocks_of(T, W)
    # 1. the last block is filled up, as by query_blocks: its surplus queries see a key, too, or they would be NaN
    n = torch.arange(N * Q, device=place.device)
    place = (place[0] + n).view(N, Q, 1)
    doc_start = doc_start[:, n.clamp(max=T - 1)].view(-1, N, Q, 1)
    window_start = window_starts(place, doc_start, W)
    # 2. of the keys those of the same window, up to the query's own
    key_place = place[:, :1] - W + torch.arange(W + Q, device=place.device)  # (N, 1, W + Q)
    same_window = (window_start <= key_place) & (key_place <= place)  # (B, N, Q, W + Q)
    # 3. of the slots those of windows of the same document that have ended
    slot_start = slot_start[:, None, None, :].repeat_interleave(config.n_slot, dim=3)  # (B, 1, 1, M R)
    has_ended = (doc_start <= slot_start) & (slot_start < window_start)  # (B, N, Q, M R)
    return torch.cat((same_window, has_ended), dim=3).flatten(0, 1)[:, None]


def query_blocks(q, window):
    """Returns q (B, H, T, D) as blocks of Q queries (B N, H, Q, D), the last one filled up with zeros."""
    T = q.size(2)
    N, Q = blocks_of(T, window)
    q = F.pad(q, (0, 0, 0, N * Q - T))
    return q.unflatten(2, (N, Q)).transpose(1, 2).flatten(0, 1)


def key_blocks(k, slots, window):
    """Returns for each block the keys that its queries may see (B N, G, S, D): its own, the W before, and all slots.

    As documents begin anywhere, so do windows: that of a query may have begun in the block before. k (B, G, W + T, D)
    begins W places before the queries; slots (B, G, M, R, D).
    """
    T = k.size(2) - window
    N, Q = blocks_of(T, window)
    k = F.pad(k, (0, 0, 0, N * Q - T))
    k = k.unfold(2, window + Q, Q).permute(0, 2, 1, 4, 3)  # (B, N, G, W + Q, D)
    slots = slots.flatten(2, 3)[:, None].expand(-1, N, -1, -1, -1)  # (B, N, G, M R, D)
    return torch.cat((k, slots), dim=3).flatten(0, 1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        D = config.head_dim
        self.window = config.window
        self.layer = layer
        self.head_dim = D
        self.wq = nn.Linear(C, config.n_head * D, bias=False)
        self.wk = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wv = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wo = nn.Linear(config.n_head * D, C, bias=False)
        self.w_pool_k = nn.Linear(config.window, config.n_slot, bias=False)  # Pk, of all heads
        self.w_pool_v = nn.Linear(config.window, config.n_slot, bias=False)  # Pv
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask=None, cache=None):
        """Returns (B, T, C) for x (B, T, C); rope is (cos, sin), mask as GPT.positions_and_mask returns it."""
        B, T, _ = x.shape
        W = self.window
        # 1. project; -1 counts the heads, of which a device has a share where tensor parallelism splits them
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        q, k = self.rotate(q, k, rope)
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)  # (B, G, T, D)
        v = v.transpose(1, 2)  # (B, G, T, D)
        # 2. put the W tokens before this call in front, where the first query's window may have begun: the cache's, or
        # zeros that nobody sees
        if cache is None:
            k = F.pad(k, (0, 0, W, 0))  # (B, G, W + T, D)
            v = F.pad(v, (0, 0, W, 0))  # (B, G, W + T, D)
        else:
            k, v = cache.append(self.layer, k, v)  # (B, G, W + T, D)
        # 3. pool the windows that end in this call, and others that nobody sees: shapes do not depend on how many end
        starts, seen = mask
        slots_k = self.pool(self.w_pool_k, k, starts)  # (B, G, N, R, D)
        slots_v = self.pool(self.w_pool_v, v, starts)  # (B, G, N, R, D)
        if cache is not None:
            slots_k, slots_v = cache.append_slots(self.layer, slots_k, slots_v)  # (B, G, M, R, D)
        # 4. attend, in blocks of Q queries
        q = query_blocks(q, W)  # (B N, H, Q, D)
        k = key_blocks(k, slots_k, W)  # (B N, G, S, D)
        v = key_blocks(v, slots_v, W)  # (B N, G, S, D)
        y = self.attend(q, k, v, seen)  # (B N, H, Q, D)
        # 5. merge blocks and heads
        y = y.unflatten(0, (B, -1)).transpose(2, 3)  # (B, N, Q, H, D)
        return self.wo(y.flatten(1, 2)[:, :T].reshape(B, T, -1))  # (B, T, C)

    def pool(self, weight, k, starts):
        """Returns the slots (B, G, N, R, D) of the windows that begin at starts (B, N) of k (B, G, W + T, D).

        Of a window that goes on after k, the slots are without meaning: no query of these tokens sees them.
        """
        B, G, n_key, D = k.shape
        at = starts[:, :, None] + torch.arange(self.window, device=k.device)  # (B, N, W)
        at = at.clamp(max=n_key - 1).flatten(1)[:, None, :, None]  # (B, 1, N W, 1)
        windows = k.gather(2, at.expand(B, G, -1, D)).unflatten(2, (-1, self.window))  # (B, G, N, W, D)
        return weight(windows.transpose(3, 4)).transpose(3, 4)  # over W: (B, G, N, D, W) -> (B, G, N, D, R)

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

    def keys_seen(self, T):
        """Returns how many keys and slots a query sees on average over T tokens."""
        R = self.w_pool_k.out_features
        return sum(t % self.window + 1 + R * (t // self.window) for t in range(T)) / T


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
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, mask, cache))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class KVCache:
    """Keys and values of the last W tokens, (B, G, W, D), and of the slots of each window, (B, G, M, R, D), by layer.

    A forward pass calls advance once, which takes places for its tokens; then each layer appends what belongs there.
    No two whole windows begin within W places, so that the slots of one that begins at a place have index place // W.
    M = max_len // W + 1: no window of the last index can be whole, and there go all that are not. slot_start (B, M)
    holds where the window of each begins, -1 while there is none. With W=3, max_len=12, documents at 0 and 5:
        windows    0 to 2    3 and 4, cut off    5 to 7    from 8, goes on
        index      0         4                   1         4

    doc_start (B, 1) is the place where the newest document begins: the last column of what stands here. Padding at the
    left is a document of its own. Two rows, the second with pad=1; E is eot_id, - is padding:
        tokens       a b E c    - a b c
        doc_start    0 0 2 2    0 1 1 1
        position     0 1 0 1    0 0 1 2    place - doc_start
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=None):
        self.config = config
        M = max_len // config.window + 1
        shape = (batch_size, config.n_kv_head, config.window, config.head_dim)
        slots_shape = (batch_size, config.n_kv_head, M, config.n_slot, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.slots_k = [torch.zeros(slots_shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.slots_v = [torch.zeros(slots_shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.slot_start = torch.full((batch_size, M), -1, device=device)
        self.max_len = max_len
        self.static = static
        self.length = 0
        if static:  # a number would be compiled into a step, and every length compiled anew
            self.length = torch.zeros((), dtype=torch.long, device=device)
        self.places = torch.arange(max_len, device=device)
        self.pad = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        if pad is not None:
            self.pad = self.pad + pad[:, None]
        self.doc_start = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.slot = None  # (B, N), by advance: where append_slots writes what was pooled

    def advance(self, idx):
        """Takes the next places for idx (B, T); returns positions and mask as GPT.positions_and_mask describes them."""
        B, T = idx.shape
        W = self.config.window
        # A static length stands on the device, and to look at it would wait for all work there: its caller counts.
        too_long = not self.static and self.length + T > self.max_len
        if B != len(self.pad) or too_long:
            size = (len(self.pad), self.max_len)
            raise ValueError(f"{B} x ({int(self.length)} + {T}) tokens do not fit a cache of {size}")
        place = self.length + self.places[:T]  # (T,)
        self.length += T
        # 1. Where a token's document begins is the last of three: its own place if it is eot_id, the first place after
        # the padding, and where the document of the token before it begins. An empty cache says 0.
        at_eot = torch.where(idx == self.config.eot_id, place, 0)  # (B, T)
        behind_padding = torch.where(place < self.pad, 0, self.pad)  # (B, T)
        doc_start = torch.maximum(torch.maximum(at_eot, behind_padding), self.doc_start).cummax(dim=1).values  # (B, T)
        self.doc_start.copy_(doc_start[:, -1:])
        # 2. Which windows end in these tokens? A whole one has W places in a row, and so exactly one of every W-th
        # place. With W=3 and new tokens 4 to 9 of a document from 0, places 4 and 7 name the windows 3 to 5 and 6 to 8.
        # One that a new document cuts off, or that goes on, may be named too, but is not whole.
        window_start = window_starts(place, doc_start, W)  # (B, T)
        start = window_start[:, ::W]  # (B, N)
        last = start + W - 1 - place[0]  # (B, N), which of the new tokens is the last of the window
        whole = (last < T) & (window_start.gather(1, last.clamp(max=T - 1)) == start)
        self.slot = torch.where(whole, start // W, self.slot_start.size(1) - 1)  # (B, N)
        self.slot_start.scatter_(1, self.slot, torch.where(whole, start, -1))
        seen = what_is_seen(place, doc_start, self.slot_start, self.config)
        return place - doc_start, (start - place[0] + W, seen)  # + W: append puts W places before these tokens

    def append(self, layer, k, v):
        """Keeps the last W of k, v (B, G, T, D); returns all, behind the W that were kept before: (B, G, W + T, D)."""
        k = torch.cat((self.k[layer], k.type_as(self.k[layer])), dim=2)
        v = torch.cat((self.v[layer], v.type_as(self.v[layer])), dim=2)
        self.k[layer].copy_(k[:, :, -self.config.window :])
        self.v[layer].copy_(v[:, :, -self.config.window :])
        return k, v

    def append_slots(self, layer, slots_k, slots_v):
        """Writes the slots (B, G, N, R, D) of the newest windows; returns those of all (B, G, M, R, D)."""
        slot = self.slot[:, None, :, None, None].expand_as(slots_k)
        self.slots_k[layer].scatter_(2, slot, slots_k.type_as(self.slots_k[layer]))
        self.slots_v[layer].scatter_(2, slot, slots_v.type_as(self.slots_v[layer]))
        return self.slots_k[layer], self.slots_v[layer]

    def rewind(self, length):
        """Forgets all tokens but the first `length`: all of them, or none."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {int(self.length)} tokens cannot be rewound to {length}")
        if 0 < length < self.length:
            state = f"the state of the last {self.config.window} tokens"
            raise ValueError(f"{state} cannot be rewound from {int(self.length)} to {length}: only to 0")
        if length == 0:
            self.doc_start.zero_()
            self.slot_start.fill_(-1)
        if self.static:
            self.length.fill_(length)
        else:
            self.length = length

    def branch(self, n):
        """Returns a copy with every sequence repeated n times, to sample n continuations of one prompt."""
        new = copy.copy(self)
        new.k = [k.repeat_interleave(n, dim=0) for k in self.k]
        new.v = [v.repeat_interleave(n, dim=0) for v in self.v]
        new.slots_k = [k.repeat_interleave(n, dim=0) for k in self.slots_k]
        new.slots_v = [v.repeat_interleave(n, dim=0) for v in self.slots_v]
        new.slot_start = self.slot_start.repeat_interleave(n, dim=0)
        new.pad = self.pad.repeat_interleave(n, dim=0)
        new.doc_start = self.doc_start.repeat_interleave(n, dim=0)
        new.length = self.length + 0  # a tensor of its own where it is one
        return new

    def bytes_per_token(self):
        """Returns the bytes that grow with the length: a token's share in the slots of its window."""
        slots = sum(x.nbytes for x in self.slots_k + self.slots_v)
        return slots // (self.slot_start.numel() * self.config.window)


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
            elif kind in ("w_pool_k", "w_pool_v"):
                R, W = p.shape
                p.copy_(torch.eye(R).repeat_interleave(W // R, dim=1) * R / W)  # a slot is the mean of W / R tokens
            elif kind in ("wo", "w_down"):
                p.normal_(0.0, residual_std)
            elif kind in ("embed", "lm_head", "wq", "wk", "wv", "w_gate", "w_up"):
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
            x = block(x, rope, mask, cache)
        if last_only:
            x = x[:, -1:]
        x = self.norm(x)
        if targets is None:
            return self.logits(x)
        if per_token:
            return self.token_losses(x, targets), torch.zeros((), device=x.device)
        return self.lm_loss(x, targets)

    def positions_and_mask(self, idx, cache=None):
        """Returns each token's position in its document (B, T), and which windows to pool with what is seen.

        That is (starts (B, N), where each window begins in the tokens with W places before them; the mask of
        what_is_seen). A cache takes places for idx here. Documents begin at eot_id, for example 9:
            idx 9 5 9 7  ->  doc_start 0 0 2 2  ->  positions 0 1 0 1;  the last token sees the last two
        """
        if cache is not None:
            return cache.advance(idx)
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}: give fewer")
        W = self.config.window
        place = torch.arange(T, device=idx.device)
        doc_start = torch.where(idx == self.config.eot_id, place, 0).cummax(dim=1).values  # (B, T)
        starts = window_starts(place, doc_start, W)[:, ::W]  # (B, N), each window that is whole has one such place
        seen = what_is_seen(place, doc_start, starts, self.config)
        return place - doc_start, (W + starts, seen)

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
    window=4, n_slot=2,
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
