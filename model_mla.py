"""Multi-head latent attention (https://arxiv.org/abs/2405.04434): attention from one small latent per token.

    c = kv_norm(Wkv_down u), r = rope(Wk_rope u)        what a token leaves in the cache: R + D numbers for all heads
    [n, p] = Wq q_norm(Wq_down u), or Wq u              a query of each head: N numbers without position, D with
    expanded: y = softmax([n, rope(p)] [Wk c, r]^T / sqrt(N + D)) Wv c      makes keys and values of each head
    absorbed: y = Wv softmax([Wk^T n, rope(p)] [c, r]^T / sqrt(N + D)) c    equal, and attends to the cache itself
    x = x + Wo y, then x = x + Wdown (silu(Wgate u) * (Wup u))              u = RMSNorm(x), each time

B  batch
T  time: the tokens of one call
S  time with the cached past
C  n_embd, the width of the residual stream
H  heads
R  kv_rank, the latent rank
N  nope_dim, the part of a head's query and key without position
D  rope_dim, the part with position
M  v_dim
V  vocabulary
c  latent
r  k_rope, the key's part with position
n  q_nope, the query's part without position
p  q_rope, the query's part with position

Differs from model_baseline.py in: GPTConfig, rope_cos_sin, Attention, KVCache, GPT.init_weights
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
    n_head: int = 12  # each head has keys and values of its own, made from the latent
    kv_rank: int = 128  # size of the latent that a token leaves in the cache, to make its keys and values from
    q_rank: int = 0  # size of the latent that queries are made from, for example 3 * kv_rank; 0 makes them from x
    nope_dim: int = 64  # size of the part of each head's query and key that knows no position
    rope_dim: int = 32  # size of the part of queries and keys that RoPE turns; all heads share one such key
    v_dim: int = 64  # size of each head's value
    n_embd: int = 768
    n_inner: int = 2048  # width of the MLP, about 8/3 n_embd
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
        least = dict(n_head=1, kv_rank=1, q_rank=0, nope_dim=1, rope_dim=2, v_dim=1)
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name}={value} is below {minimum}: try {getattr(GPTConfig, name)}")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} is odd, and RoPE turns pairs: try {self.rope_dim + 1}")
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
    D = config.rope_dim
    i = torch.arange(D // 2, device=positions.device).float()
    inv_freq = 1.0 / config.rope_theta ** (2 * i / D)  # (D/2,)
    if config.rope_scaling == "linear":
        inv_freq = inv_freq / config.rope_factor
    elif config.rope_scaling == "yarn":
        inv_freq, _ = yarn(inv_freq, config)  # Attention.scale takes the magnitude
    elif config.rope_scaling == "llama3":
        inv_freq = llama3(inv_freq, config)
    angle = positions[..., None, None].float() * inv_freq
    return angle.cos(), angle.sin()


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
        H = config.n_head
        R = config.kv_rank
        N = config.nope_dim
        D = config.rope_dim
        M = config.v_dim
        self.layer = layer
        self.kv_rank = R
        self.nope_dim = N
        self.rope_dim = D
        self.scale = (N + D) ** -0.5
        if config.rope_scaling == "yarn":
            # On cos and sin the magnitude would sharpen only the part with position. It does not depend on frequencies.
            _, magnitude = yarn(torch.ones(D // 2), config)
            self.scale *= magnitude**2
        if config.q_rank > 0:
            self.wq_down = nn.Linear(C, config.q_rank, bias=False)
            self.q_norm = RMSNorm(config.q_rank, 1e-6)  # DeepSeek's code has this eps here, whatever norm_eps is
            self.wq = nn.Linear(config.q_rank, H * (N + D), bias=False)
        else:
            self.wq_down = nn.Identity()
            self.q_norm = nn.Identity()
            self.wq = nn.Linear(C, H * (N + D), bias=False)
        self.wkv_down = nn.Linear(C, R, bias=False)
        self.kv_norm = RMSNorm(R, 1e-6)  # as above
        self.wk_rope = nn.Linear(C, D, bias=False)
        self.wk = nn.Linear(R, H * N, bias=False)
        self.wv = nn.Linear(R, H * M, bias=False)
        self.wo = nn.Linear(H * M, C, bias=False)

    def forward(self, x, rope, mask=None, cache=None):
        B, T, _ = x.shape
        # 1. queries of each head; -1 counts the heads, which are fewer where a model is cut by heads over devices
        q = self.wq(self.q_norm(self.wq_down(x))).view(B, T, -1, self.nope_dim + self.rope_dim)  # (B, T, H, N + D)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)  # (B, T, H, N), (B, T, H, D)
        # 2. what the cache holds of each token: the latent after its norm, as absorbed needs keys linear in it
        latent = self.kv_norm(self.wkv_down(x))  # (B, T, R)
        k_rope = self.wk_rope(x).view(B, T, 1, -1)  # (B, T, 1, D)
        q_rope, k_rope = self.rotate(q_rope, k_rope, rope)
        kv = torch.cat((latent, k_rope[:, :, 0]), dim=-1)  # (B, T, R + D)
        if cache is not None:
            kv = cache.append(self.layer, kv)  # (B, S, R + D)
        # 3. attend. A query costs less expanded: N + D + M products with each token of the past, against 2 (R + D).
        # But first keys and values of the whole past are made, R (N + M) products for each of its tokens, which pays
        # from about 100 queries on at the default sizes. Generation has one.
        if T == 1:
            y = self.absorbed(q_nope, q_rope, kv, mask)  # (B, T, H, M)
        else:
            y = self.expanded(q_nope, q_rope, kv, mask)  # (B, T, H, M)
        # 4. merge the heads
        return self.wo(y.reshape(B, T, -1))  # (B, T, C)

    def rotate(self, q, k, rope):
        """Returns q (B, T, H, D) and k (B, T, 1, D), turned by their positions."""
        q = apply_rope(q, *rope)
        k = apply_rope(k, *rope)
        return q, k

    def expanded(self, q_nope, q_rope, kv, mask):
        """Returns the attention (B, T, H, M) of q_nope (B, T, H, N) and q_rope (B, T, H, D) to the tokens of kv.

        Keys and values of each head are made from kv (B, S, R + D).
        """
        B, S, _ = kv.shape
        H = q_nope.size(2)
        latent, k_rope = kv.split((self.kv_rank, self.rope_dim), dim=-1)  # (B, S, R), (B, S, D)
        k_nope = self.wk(latent).view(B, S, H, -1)  # (B, S, H, N)
        k_rope = k_rope[:, :, None].expand(-1, -1, H, -1)  # (B, S, H, D), the same for all heads
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)  # (B, H, T, N + D)
        k = torch.cat((k_nope, k_rope), dim=-1).transpose(1, 2)  # (B, H, S, N + D)
        v = self.wv(latent).view(B, S, H, -1).transpose(1, 2)  # (B, H, S, M)
        return self.attend(q, k, v, mask).transpose(1, 2)

    def absorbed(self, q_nope, q_rope, kv, mask):
        """Returns what expanded does, for T = 1, without making keys and values: kv (B, S, R + D) serves as it is.

        n . (Wk c) = (Wk^T n) . c, and with softmax weights a, sum a (Wv c) = Wv (sum a c).
        """
        H = q_nope.size(2)
        wk = self.wk.weight.view(H, -1, self.kv_rank)  # (H, N, R)
        wv = self.wv.weight.view(H, -1, self.kv_rank)  # (H, M, R)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, wk)  # (B, 1, H, R)
        # All heads share the same keys: they go in as H queries of one head. self.attend would take these for H
        # tokens in the order of time, of which the first sees one key only.
        q = torch.cat((q_latent, q_rope), dim=-1)  # (B, 1, H, R + D)
        k = kv[:, None]  # (B, 1, S, R + D)
        # The values are the first R columns of the keys. Whole keys serve as values too, and y is cut instead:
        # FlashAttention wants values as wide as keys.
        y = F.scaled_dot_product_attention(q, k, k, mask, scale=self.scale)  # (B, 1, H, R + D)
        y = y[..., : self.kv_rank]  # (B, 1, H, R)
        return torch.einsum("bthr,hmr->bthm", y, wv)  # (B, 1, H, M)

    def attend(self, q, k, v, mask):
        """Returns softmax attention (B, H, T, M) of q (B, H, T, N + D) to k (B, H, S, N + D) and v (B, H, S, M)."""
        causal = False
        if mask is None and q.size(2) > 1:  # a single query sees all keys
            causal = True
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale)


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
    """Of each token so far its latent and its one turned key, in buffers made once: kv[layer] (B, max_len, R + D).

    They stand side by side so that the absorbed form attends to them without a copy.

    A forward pass calls advance once, which takes places for its tokens; then each layer appends what belongs there.
    doc_start (B, max_len) holds for each place the place where its document begins; tokens see each other where it is
    equal. Padding at the left is a document of its own. Two rows, the second with pad=1; E is eot_id, - is padding:
        tokens       a b E c    - a b c
        doc_start    0 0 2 2    0 1 1 1
        position     0 1 0 1    0 0 1 2    place - doc_start
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=None):
        shape = (batch_size, max_len, config.kv_rank + config.rope_dim)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
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

    def append(self, layer, kv):
        """Writes kv (B, T, R + D) at the places of the newest tokens; returns that of all so far, (B, S, R + D)."""
        place = self.last_places(kv.size(1))
        self.kv[layer].index_copy_(1, place, kv.type_as(self.kv[layer]))
        S = self.n_keys()
        return self.kv[layer][:, :S]

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
        if self.static:
            self.length.fill_(length)
        else:
            self.length = length

    def branch(self, n):
        """Returns a copy with every sequence repeated n times, to sample n continuations of one prompt."""
        new = copy.copy(self)
        new.kv = [kv.repeat_interleave(n, dim=0) for kv in self.kv]
        new.pad = self.pad.repeat_interleave(n, dim=0)
        new.doc_start = self.doc_start.repeat_interleave(n, dim=0)
        new.length = self.length + 0  # a tensor of its own where it is one
        return new

    def bytes_per_token(self):
        return sum(x.nbytes for x in self.kv) // self.doc_start.numel()


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
            elif kind in ("wq_down", "wkv_down", "wk_rope"):
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


TINY = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, kv_rank=32, q_rank=48, nope_dim=16, rope_dim=8,
            v_dim=16, n_embd=64, n_inner=160)  # fmt: skip

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
