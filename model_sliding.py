"""Most layers attend to a window of the last tokens, a few to all of them (https://arxiv.org/abs/2503.19786).

    q, k, v = Wq u, Wk u, Wv u                                                  u = RMSNorm(x)
    x = x + Wo softmax(rope(norm(q)) rope(norm(k))^T / sqrt(D)) v
        the query at t of a full layer sees the keys s <= t
        the query at t of a local layer sees those of t - W < s <= t, and the first P of its document
    x = x + Wdown (silu(Wgate u) * (Wup u))                                     u = RMSNorm(x)
    with attention_sink the softmax of scores z_s is e^z_s / (e^sink + sum over s of e^z_s)

What is further back than W reaches a token by way of others: through L local layers it sees up to L (W - 1) tokens
back. A local layer keeps P + W keys and values, however long the text is. That is what a window saves here: in training
all T^2 scores are computed and most are masked, where kernels.py leaves out those that no query needs.
Sinks: https://arxiv.org/abs/2508.10925 (gpt-oss). First tokens: https://arxiv.org/abs/2309.17453. Caps:
https://arxiv.org/abs/2408.00118 (Gemma 2).

B  batch
T  time: the tokens of one call
S  keys that a call meets: in a full layer all so far
C  n_embd, the width of the residual stream
H  query heads
G  key/value heads
D  head_dim
W  window: the keys that a query of a local layer sees, its own among them
P  n_global_token, the first tokens of a document, which local layers see too
R  slots of a local layer's ring in the cache: W, or all where fewer tokens come
V  vocabulary

Differs from model_baseline.py in: GPTConfig, rope_cos_sin, Attention, KVCache, GPT.init_weights, GPT.forward,
GPT.positions_and_mask, near_or_global, mask_of_each_letter
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
    layer_pattern: str = "llllla"  # a full, l local, n full and m local without positions; repeated, cut to n_layer
    window: int = 256  # how many keys a query of a local layer sees, its own among them; a built model can change it
    n_global_token: int = 0  # so many first tokens of a document are seen in local layers too, from any distance
    attention_sink: bool = False  # a learned logit per head takes part of the softmax: a head need not attend
    attention_softcap: float = 0.0  # c > 0: scores of queries and keys become c * tanh(scores / c)
    rope_theta: float = 10000.0  # wavelengths reach 2 pi rope_theta tokens: 1e6 for long context
    local_rope_theta: float = 10000.0  # rope_theta of local layers, which rope_scaling leaves as they are
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
        elsewhere = dict(d="a delta rule layer", s="a state space layer", k="linear attention")
        for letter in self.layer_pattern:
            if letter not in "alnm":
                meaning = elsewhere.get(letter, "no kind of layer")
                raise ValueError(f"layer_pattern={self.layer_pattern!r}: {letter} is {meaning}: try letters a, l, n, m")
        if not self.layer_pattern:
            raise ValueError("layer_pattern='' says nothing: try llllla")
        self.layer_pattern = (self.layer_pattern * self.n_layer)[: self.n_layer]
        if self.window < 1:
            raise ValueError(f"window={self.window}: a query sees at least its own key: try 1 or more")
        if not 0 <= self.n_global_token <= self.window:
            raise ValueError(f"n_global_token={self.n_global_token} is not between 0 and window={self.window}")
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


def rope_cos_sin(positions, config, letter="a"):
    """Returns cos and sin in fp32 of the angles position * theta^(-2i/D), one for each pair i of a head.

    Local layers, letter l, have their own theta and are never stretched; layers without positions, n and m, angles 0.
    positions (T,) or (B, T) -> (T, 1, D/2) or (B, T, 1, D/2); the 1 stands for all heads.
    """
    D = config.head_dim
    i = torch.arange(D // 2, device=positions.device).float()
    inv_freq = 1.0 / config.rope_theta ** (2 * i / D)  # (D/2,)
    magnitude = 1.0
    if letter == "l":
        inv_freq = 1.0 / config.local_rope_theta ** (2 * i / D)
    elif letter in "nm":
        inv_freq = torch.zeros_like(inv_freq)
    elif config.rope_scaling == "linear":
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


def near_or_global(place, key_place, doc_start, config):
    """Returns the mask of a local layer (B, 1, T, S), for queries at place (T,) and keys at key_place (S,) or (B, S).

    doc_start (B, T): the place where the document of each query begins. With window 2 and 1 global token, x is seen:
        key          0 1 2 3 4
        query 3      x . x x .
        query 4      x . . x x
    """
    key_place = key_place[..., None, :]  # (1, S) or (B, 1, S)
    place = place[:, None]  # (T, 1)
    doc_start = doc_start[:, :, None]  # (B, T, 1)
    near = key_place > place - config.window
    is_global = key_place < doc_start + config.n_global_token
    seen = (doc_start <= key_place) & (key_place <= place) & (near | is_global)  # (B, T, S)
    return seen[:, None]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        D = config.head_dim
        self.config = config
        self.layer = layer
        self.letter = config.layer_pattern[layer]
        self.head_dim = D
        self.wq = nn.Linear(C, config.n_head * D, bias=False)
        self.wk = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wv = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wo = nn.Linear(config.n_head * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.sink = None
        if config.attention_sink:
            self.sink = nn.Parameter(torch.zeros(config.n_head))  # (H,): as one more key of score 0

    def forward(self, x, rope, mask=None, cache=None):
        """Returns (B, T, C) for x (B, T, C); rope[letter] is (cos, sin), mask as GPT.positions_and_mask returns it."""
        B, T, _ = x.shape
        # 1. project; -1 counts the heads, of which a device has a share where tensor parallelism splits them
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        q, k = self.rotate(q, k, rope[self.letter])
        # 2. attend, heads before time
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)  # (B, G, T, D)
        v = v.transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        y = self.attend(q, k, v, mask[self.letter])  # (B, H, T, D)
        # 3. merge the heads
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def rotate(self, q, k, rope):
        """Returns q (B, T, H, D) and k (B, T, G, D), each head normed (QK-norm) and turned by its position."""
        q = apply_rope(self.q_norm(q), *rope)
        k = apply_rope(self.k_norm(k), *rope)
        return q, k

    def attend(self, q, k, v, mask):
        """Returns softmax attention (B, H, T, D) of q (B, H, T, D) to k, v (B, G, S, D); H / G heads share a key."""
        if self.sink is not None or self.config.attention_softcap > 0:
            return self.attend_by_hand(q, k, v, mask)
        causal = False
        if mask is None and q.size(2) > 1:  # S = T here; a single query sees all S keys
            causal = True
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))

    def attend_by_hand(self, q, k, v, mask):
        """Returns what attend does, with softcap and sink, for which scores (B, H, T, S) have to be in memory."""
        B, H, T, D = q.shape
        S = k.size(2)
        k = k.repeat_interleave(H // k.size(1), dim=1)  # (B, H, S, D)
        v = v.repeat_interleave(H // v.size(1), dim=1)  # (B, H, S, D)
        scores = q @ k.transpose(2, 3) / D**0.5  # (B, H, T, S), in bf16 rounded to it
        cap = self.config.attention_softcap
        if cap > 0:
            scores = cap * torch.tanh(scores / cap)  # before the mask, whose -inf would become -cap
        if mask is None:  # S = T, or T = 1
            mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~mask, -math.inf)
        if self.sink is not None:
            sink = self.sink.type_as(scores).view(1, -1, 1, 1).expand(B, -1, T, 1)
            scores = torch.cat((scores, sink), dim=-1)  # (B, H, T, S + 1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        p = scores.softmax(dim=-1, dtype=wide).type_as(v)
        return p[..., :S] @ v  # the sink has no value: what it took is missing from the sum

    def keys_seen(self, T):
        """Returns how many of T keys a query sees on average; the query at place t sees min(t + 1, most)."""
        most = T
        if self.letter in "lm":
            most = min(T, self.config.window + self.config.n_global_token)
        return most - most * (most - 1) / (2 * T)  # the first queries see 1, 2, ... most - 1


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
    """Keys and values of the tokens so far, in buffers made once: k[layer] and v[layer] (B, G, max_len, D).

    A forward pass calls advance once, which takes places for its tokens; then each layer appends what belongs there.
    doc_start (B, max_len) holds for each place the place where its document begins; tokens see each other where it is
    equal. Padding at the left is a document of its own. Two rows, the second with pad=1; E is eot_id, - is padding:
        tokens       a b E c    - a b c
        doc_start    0 0 2 2    0 1 1 1
        position     0 1 0 1    0 0 1 2    place - doc_start

    k[layer] and v[layer] of a local layer are (B, G, P + R, D): P slots for the first tokens of the document, and a
    ring of R slots, in which the token at a place stands in slot place % R and overwrites the one that has left the
    window:
        R=3, after a b c    a b c
        after d and e       d e c
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=None):
        self.config = copy.copy(config)  # a window that is set later is that of other caches
        self.n_ring = min(config.window, max_len)  # R
        self.n_prefix = min(config.n_global_token, max_len - self.n_ring)  # P: none where nothing leaves the window
        self.k = []
        self.v = []
        for letter in config.layer_pattern:
            slots = max_len
            if letter in "lm":
                slots = self.n_prefix + self.n_ring
            shape = (batch_size, config.n_kv_head, slots, config.head_dim)
            self.k.append(torch.zeros(shape, device=device, dtype=dtype))
            self.v.append(torch.zeros(shape, device=device, dtype=dtype))
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
        if self.has_documents:
            self.doc_start.index_copy_(1, place, self.new_doc_start(idx, place))
        doc_start = self.doc_start.index_select(1, place)  # (B, T)
        local = near_or_global(place, self.local_places(place), doc_start, self.config)
        # The first tokens attend by is_causal, whose first query sees key 0 alone; a single query sees every key.
        needs_no_mask = first or T == 1
        if needs_no_mask and not self.has_documents and not self.static:
            return place, mask_of_each_letter(None, local)
        causal = self.places[: self.n_keys()] <= place[:, None]  # (T, S)
        if not self.has_documents:
            return place, mask_of_each_letter(causal, local)
        same = doc_start[:, :, None] == self.doc_start[:, None, : self.n_keys()]  # (B, T, S)
        return place - doc_start, mask_of_each_letter((same & causal)[:, None], local)

    def new_doc_start(self, idx, place):
        """Returns for the newest tokens idx (B, T) the places (B, T) where their documents begin."""
        # Where a token's document begins is the last of three: its own place if it is eot_id, the first place after the
        # padding, and where the document of the token before it begins. An empty cache says 0 at place 0.
        at_eot = torch.where(idx == self.eot_id, place, 0)  # (B, T)
        behind_padding = torch.where(place < self.pad, 0, self.pad)  # (B, T)
        previous = (place[:1] - 1).clamp(min=0)  # (1,), a tensor since a static length is one
        before = self.doc_start.index_select(1, previous)  # (B, 1)
        return torch.maximum(torch.maximum(at_eot, behind_padding), before).cummax(dim=1).values

    def local_places(self, place):
        """Returns the places (B, S) of the keys that append gives a local layer's queries at place (T,); -1 for none.

        A single token is written first: what it overwrites has left its window. Of several, the first see what the last
        overwrite, so they get the slots as they were, and then themselves. With P=1, R=3, a document that begins at 5:
            query at 9             5 | 9 7 8          the prefix | slots 0 1 2: the newest that are 0, 1, 2 modulo R
            queries at 7 and 8    -1 | 6 4 5 | 7 8    5 is still in the ring, and must not be seen twice
        """
        B = len(self.pad)
        last = place[:1] - 1  # (1,)
        if len(place) == 1:
            last = place
        ring = last - (last - self.places[: self.n_ring]) % self.n_ring  # (R,), below 0 where nothing stands yet
        doc_start = self.doc_start.index_select(1, last.clamp(min=0))  # (B, 1)
        prefix = doc_start + self.places[: self.n_prefix]  # (B, P)
        prefix = torch.where(prefix <= last - self.n_ring, prefix, -1)  # the copy counts once the ring has lost it
        slots = torch.cat((prefix, ring.expand(B, -1)), dim=1)  # (B, P + R)
        if len(place) == 1:
            return slots
        return torch.cat((slots, place.expand(B, -1)), dim=1)  # (B, P + R + T)

    def append(self, layer, k, v):
        """Writes k, v (B, G, T, D) of the newest tokens; returns those that they may see (B, G, S, D)."""
        if self.config.layer_pattern[layer] in "lm":
            return self.append_to_ring(self.k[layer], k), self.append_to_ring(self.v[layer], v)
        place = self.last_places(k.size(2))
        self.k[layer].index_copy_(2, place, k.type_as(self.k[layer]))
        self.v[layer].index_copy_(2, place, v.type_as(self.v[layer]))
        S = self.n_keys()
        return self.k[layer][:, :, :S], self.v[layer][:, :, :S]

    def append_to_ring(self, slots, new):
        """Writes new (B, G, T, D) into slots (B, G, P + R, D); returns what stands at local_places."""
        B, G, T, D = new.shape
        new = new.type_as(slots)
        seen = slots
        if T > 1:  # a copy: the first of these queries sees what the last of these tokens overwrites
            seen = torch.cat((slots, new), dim=2)  # (B, G, P + R + T, D)
        place = self.last_places(T)
        slot = self.n_prefix + place % self.n_ring
        slots.index_copy_(2, slot[-self.n_ring :], new[:, :, -self.n_ring :])
        if self.n_prefix > 0:
            # Of the first P tokens of each row's newest document some may be among the new ones. With P=2, new tokens
            # at 4, 5 and 6 and a document that begins at 3, at is -1 0: only the second is written.
            doc_start = self.doc_start.index_select(1, place[-1:])  # (B, 1)
            at = doc_start + self.places[: self.n_prefix] - place[0]  # (B, P), which of the new tokens
            is_new = ((0 <= at) & (at < T))[:, None, :, None]
            at = at.clamp(0, T - 1)[:, None, :, None].expand(B, G, -1, D)
            prefix = slots[:, :, : self.n_prefix]
            prefix.copy_(torch.where(is_new, new.gather(2, at), prefix))
        return seen

    def last_places(self, T):
        """Returns the places (T,) of the newest T tokens."""
        if self.static:
            return self.length - T + self.places[:T]
        return self.places[self.length - T : self.length]

    def n_keys(self):
        """Returns S: a static cache shows all its places at every length, and the mask hides those not yet taken."""
        return self.max_len if self.static else self.length

    def rewind(self, length):
        """Forgets all tokens but the first `length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {int(self.length)} tokens cannot be rewound to {length}")
        # Until the ring is full nothing is overwritten, but a prefix may be that of a newer document from the first on.
        has_ring = "l" in self.config.layer_pattern or "m" in self.config.layer_pattern
        overwritten = has_ring and (self.n_prefix > 0 or self.length > self.n_ring)
        if overwritten and 0 < length < self.length:
            ring = f"the state of the last {self.n_ring} tokens in a ring"
            raise ValueError(f"{ring} cannot be rewound from {int(self.length)} to {length}: only to 0")
        if self.static:
            self.length.fill_(length)
        else:
            self.length = length

    def branch(self, n):
        """Returns a copy with every sequence repeated n times, to sample n continuations of one prompt."""
        new = copy.copy(self)
        new.k = [k.repeat_interleave(n, dim=0) for k in self.k]
        new.v = [v.repeat_interleave(n, dim=0) for v in self.v]
        new.pad = self.pad.repeat_interleave(n, dim=0)
        new.doc_start = self.doc_start.repeat_interleave(n, dim=0)
        new.length = self.length + 0  # a tensor of its own where it is one
        return new

    def bytes_per_token(self):
        """Returns the bytes that grow with the length: those of the layers that are not local."""
        total = 0
        for letter, k, v in zip(self.config.layer_pattern, self.k, self.v):
            if letter in "an":
                total += k.nbytes + v.nbytes
        return total // self.doc_start.numel()


def mask_of_each_letter(full, local):
    """Returns {letter of layer_pattern: mask}."""
    return dict(a=full, n=full, l=local, m=local)


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
            elif kind == "sink":
                p.zero_()
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
        letters = set(self.config.layer_pattern)
        rope = {letter: rope_cos_sin(positions, self.config, letter) for letter in letters}
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
        """Returns each token's position in its document, (T,) or (B, T), and {letter: mask}, True where a key is seen.

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
            local = near_or_global(place, place, place.new_zeros(1, T), self.config)  # (1, 1, T, T)
            return place, mask_of_each_letter(None, local)
        doc_start = torch.where(idx == self.config.eot_id, place, 0).cummax(dim=1).values  # (B, T)
        same = doc_start[:, :, None] == doc_start[:, None, :]  # (B, T, T)
        causal = place <= place[:, None]  # (T, T)
        local = near_or_global(place, place, doc_start, self.config)  # (B, 1, T, T)
        return place - doc_start, mask_of_each_letter((same & causal)[:, None], local)

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
    layer_pattern="la", window=5,
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
