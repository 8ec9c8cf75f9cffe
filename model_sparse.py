"""A query attends to a few blocks of keys, by rule and by their mean (https://arxiv.org/abs/2502.13189).

    q, k, v = rope(norm(Wq u)), rope(norm(Wk u)), Wv u                          u = RMSNorm(x)
    chosen  = the blocks of the rule, and of the others before its own those with the largest q . mean(k of the block)
    x = x + Wo softmax(q k^T / sqrt(D)) v        over the keys of chosen blocks, and of its own block up to itself
    x = x + Wdown (silu(Wgate u) * (Wup u))                                     u = RMSNorm(x)

By rule a query sees the last blocks, then every so-manyth, and the first ones of its document (sparse transformers,
https://arxiv.org/abs/1904.10509). Each head of a query chooses further ones without any parameters (mixture of block
attention, MoBA). There are only earlier blocks to choose from, as a mean tells of all tokens of its block.

mask_of_blocks and softmax define the result. attend_gathered computes the same from the chosen blocks alone: what it
costs grows with P, and the scores of all N means, which choose_blocks needs, are few beside those of all keys.

B  batch
T  time: the tokens of one call
S  time with the cached past
C  n_embd, the width of the residual stream
H  query heads
G  key/value heads
D  head_dim
b  key_block, the tokens of a block
N  slots for complete blocks, S / b of them; no query sees one in which no block is complete
P  blocks that a query attends to beside its own, at most
V  vocabulary

Differs from model_baseline.py in: GPTConfig, Attention, KVCache, GPT.positions_and_mask, Blocks, blocks_of,
block_starts, block_means, rows_at, static_blocks, choose_blocks, mask_of_blocks, attend_to_part, attend_to_own,
attend_to_slots
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
    key_block: int = 64  # tokens in a block of keys
    n_local_block: int = 1  # a query sees the last so many blocks, its own among them
    block_stride: int = 0  # a query sees every so-manyth of the blocks before its own, counted back from it; 0: none
    n_global_block: int = 0  # a query sees the first so many blocks of its document
    top_k_block: int = 3  # its own included: each head of a query chooses top_k_block - 1 of the others
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
        if self.key_block < 1 or self.block_size % self.key_block:
            fits = math.gcd(self.block_size, 16)
            raise ValueError(f"block_size={self.block_size} is no multiple of key_block={self.key_block}: try {fits}")
        if self.n_local_block < 1:
            raise ValueError(f"n_local_block={self.n_local_block}: a query sees at least its own block: try 1 or more")
        if self.top_k_block < 1:
            raise ValueError(
                f"top_k_block={self.top_k_block} counts the own block, which is always seen: try 1 or more"
            )
        if self.block_stride < 0 or self.n_global_block < 0:
            numbers = f"block_stride={self.block_stride} and n_global_block={self.n_global_block}"
            raise ValueError(f"{numbers} are counts: try 0 for none")
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


QUERIES_AT_ONCE = 512  # the scores of so many are in memory at a time, however long the text is


class Blocks(NamedTuple):
    """Where the queries of a call stand, and what they may choose from: S keys, in N complete blocks of b tokens.

    A document is cut into blocks from its own start, so that it is cut alike wherever it stands. Of the complete blocks
    one at most begins in each stretch of b places, and the number of the stretch is its slot. Two documents, b=4:
        place    0 1 2 3 4 5 6 7 8 9 10
        block    w w X X X X Y Y Y Y z     w and z are not complete: their own tokens alone see them
        slot     0 0 0 0 0 0 1 1 1 1 2     X begins at place 2, in stretch 0, and Y at place 6, in stretch 1
    """

    place: torch.Tensor  # (T,) of the queries
    doc_start: torch.Tensor  # (B, T) the place where the document of a query begins
    own_start: torch.Tensor  # (B, T) the place where its own block begins
    start: torch.Tensor  # (B, N) the place where the block of a slot begins
    key_slot: torch.Tensor  # (B, S) the slot of a key's block

    def of_queries(self, some):
        """Returns the same for a slice of the queries."""
        return Blocks(self.place[some], self.doc_start[:, some], self.own_start[:, some], self.start, self.key_slot)


def blocks_of(place, doc_start, config):
    """Returns Blocks of queries at place (T,), and of keys whose documents begin at doc_start (B, S)."""
    b = config.key_block
    S = doc_start.size(1)
    key_place = torch.arange(S, device=place.device)  # (S,)
    key_slot = doc_start // b + (key_place - doc_start) // b  # (B, S)
    start = block_starts(torch.arange(S // b, device=place.device), doc_start, b)  # (B, N)
    doc_start = doc_start.index_select(1, place)  # (B, T)
    own_start = place - (place - doc_start) % b  # (B, T)
    return Blocks(place, doc_start, own_start, start, key_slot)


def block_starts(slot, doc_start, b):
    """Returns the places (B, n) where the blocks of slot (n,) begin, for keys with doc_start (B, S)."""
    last = (slot + 1) * b - 1  # (n,) the end of the stretch, which the complete block that begins there covers
    last = last.clamp(max=doc_start.size(1) - 1)
    return last - (last - doc_start.index_select(1, last)) % b


def block_means(k, start, b):
    """Returns the mean (B, G, n, D) of the b keys of k (B, G, S, D) from each start (B, n) on."""
    place = start[:, None, :, None] + torch.arange(b, device=k.device)  # (B, 1, n, b)
    return rows_at(k, place.clamp(max=k.size(2) - 1)).mean(dim=3)


def rows_at(x, place):
    """Returns the rows of x (B, G, S, D) at place (B or 1, G or 1, ...): (B, G, ..., D)."""
    further = [1] * (place.ndim - 2)
    sequence = torch.arange(x.size(0), device=x.device).view(-1, 1, *further)
    head = torch.arange(x.size(1), device=x.device).view(-1, *further)
    return x[sequence, head, place]


def static_blocks(blocks, config):
    """Returns (B, T, N): inf for a block that a query sees by rule, 0 for others before its own, else -inf."""
    b = config.key_block
    slot = torch.arange(blocks.start.size(1), device=blocks.place.device)  # (N,)
    first = blocks.doc_start[..., None] // b  # (B, T, 1) the slot of the document's first block
    own = first + (blocks.place - blocks.doc_start)[..., None] // b  # (B, T, 1)
    static = (own - slot < config.n_local_block) | (slot - first < config.n_global_block)  # (B, T, N)
    if config.block_stride > 0:
        static = static | ((own - slot) % config.block_stride == 0)
    rule = torch.zeros(static.shape, device=slot.device).masked_fill(static, math.inf)
    return rule.masked_fill((slot < first) | (slot >= own), -math.inf)


def choose_blocks(q, means, blocks, config):
    """Returns slots (B, H, T, P) of earlier blocks for q (B, H, T, D), and which of them the query attends to.

    means (B, G, N, D). P is the most that any query can attend to; the first ones have fewer blocks before them.
    """
    B, H, T, D = q.shape
    G, N = means.shape[1:3]
    # 1. score all blocks; the choice has no gradient
    scores = torch.zeros(B, H, T, N, device=q.device)
    if config.top_k_block > 1:
        wide = torch.promote_types(q.dtype, torch.float32)  # in bf16 many blocks would be equally good
        queries = q.detach().reshape(B, G, -1, D).to(wide)  # (B, G, H / G * T, D)
        with torch.autocast(q.device.type, enabled=False):
            scores = (queries @ means.transpose(2, 3).to(wide)).view(B, H, T, N)
    rule = static_blocks(blocks, config)  # (B, T, N)
    scores = scores + rule[:, None]
    # 2. take what is seen by rule, then the best of the rest
    P = config.n_local_block - 1 + config.n_global_block + config.top_k_block - 1
    if config.block_stride > 0:
        P += N // config.block_stride
    best, slots = scores.topk(min(P, N), dim=-1)  # (B, H, T, P)
    n_wanted = (rule == math.inf).sum(dim=-1) + config.top_k_block - 1  # (B, T)
    rank = torch.arange(slots.size(-1), device=q.device)  # (P,)
    chosen = (rank < n_wanted[:, None, :, None]) & (best > -math.inf)  # (B, H, T, P)
    return slots, chosen


def mask_of_blocks(blocks, slots, chosen):
    """Returns the mask (B, H, T, S), True for the keys that a query sees: of chosen blocks, and of its own so far."""
    B, H, T, _ = slots.shape
    N = blocks.start.size(1)
    key_place = torch.arange(blocks.key_slot.size(1), device=slots.device)  # (S,)
    # 1. from blocks to their tokens; the last keys may be of a block that is not complete, slot N
    is_chosen = torch.zeros(B, H, T, N + 1, dtype=torch.bool, device=slots.device).scatter(3, slots, chosen)
    key_slot = blocks.key_slot.clamp(max=N)[:, None, None].expand(B, H, T, -1)
    in_chosen = is_chosen.gather(3, key_slot)  # (B, H, T, S)
    # 2. of the same document; and of the own block, which begins in it
    same_document = key_place >= blocks.doc_start[..., None]  # (B, T, S)
    in_own = key_place >= blocks.own_start[..., None]  # (B, T, S)
    seen = (in_chosen & same_document[:, None]) | in_own[:, None]
    return seen & (key_place <= blocks.place[:, None])


def attend_to_part(q, k, v, seen=None):
    """Returns softmax attention (..., T, D) of q (..., T, D) to k, v (..., S, D), and the log (..., T) of its weight.

    The weight is the sum of e^score over these keys, from which their share beside other keys of the query follows.
    """
    scores = (q / q.size(-1) ** 0.5) @ k.transpose(-2, -1)  # (..., T, S)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    p = scores.softmax(dim=-1)
    log_weight = scores.amax(dim=-1) - p.amax(dim=-1).log()  # since p = e^score / weight
    return p.to(v.dtype) @ v, log_weight


def attend_to_own(q, k, v, blocks, b):
    """Returns attention of each query to its own block: (B, H, T, D) and the log of its weight (B, H, T).

    Of w queries at a time, the first may see the b - 1 keys before it: the w + b - 1 up to the last are read for all.
    """
    B, H, T, D = q.shape
    w = min(T, b)
    n = -(-T // w)
    rest = n * w - T  # queries that fill up the last w; they see something, as 0 / 0 would make gradients NaN
    first = blocks.place[0] - (b - 1) + w * torch.arange(n, device=q.device)  # (n,)
    key_place = first[:, None] + torch.arange(w + b - 1, device=q.device)  # (n, w + b - 1)
    start = F.pad(blocks.own_start, (0, rest)).view(B, n, w, 1)
    end = F.pad(blocks.place, (0, rest), value=k.size(2)).view(n, w, 1)
    seen = (key_place[:, None] >= start) & (key_place[:, None] <= end)  # (B, n, w, w + b - 1)
    q = F.pad(q, (0, 0, 0, rest)).view(B, k.size(1), -1, n, w, D)  # (B, G, H / G, n, w, D)
    at = key_place.clamp(0, k.size(2) - 1)[None, None, None]
    y, log_weight = attend_to_part(q, rows_at(k, at), rows_at(v, at), seen[:, None, None])
    return y.reshape(B, H, -1, D)[:, :, :T], log_weight.reshape(B, H, -1)[:, :, :T]


def attend_to_slots(q, k, v, start, slots, b):
    """Returns attention to each block of slots (B, H, T, P) by itself: (B, H, T, P, D), and the logs of their weights.

    Also to slots that a query did not choose, which the caller drops. The queries of a block are brought together, as
    tokens are at their expert, in tiles of r, each with one block only. No shape depends on what was chosen. Three
    queries that chose two blocks each, r=2:
        slots     2 0 | 0 1 | 0 2
        block     0 0 0 1 2 2        the choices, sorted
        order     1 2 4 3 0 5        where each stood before
        row       0 1 2 4 6 7        of the tiles; rows 3 and 5 are padding
        owner     0 0 1 2            the block of each tile
    """
    B, H, T, P = slots.shape
    G, S, D = k.shape[1:]
    N = start.size(1)
    # 1. sort the choices by block
    block, order = slots.reshape(B, G, -1).sort(dim=-1)  # (B, G, M), M = H / G * T * P
    M = block.size(-1)
    # 2. fill the tiles: half the mean number of rows, and the most tiles that are needed whatever was chosen
    r = 1 + M // (2 * N + 1)
    n = N + (M - N) // r  # one for each block, and one for each r choices beyond those
    every = torch.arange(N, device=q.device).expand(B, G, N).contiguous()
    ends = torch.searchsorted(block, every, right=True)  # (B, G, N)
    padding = -ends.diff(dim=-1, prepend=ends.new_zeros(B, G, 1)) % r  # (B, G, N)
    row = torch.arange(M, device=q.device) + (padding.cumsum(-1) - padding).gather(2, block)  # (B, G, M)
    owner = block.new_zeros(B, G, n).scatter(2, row // r, block)  # (B, G, n)
    query = block.new_zeros(B, G, n * r).scatter(2, row, order // P)  # (B, G, n r)
    # 3. attend
    place = start[:, None].expand(B, G, N).gather(2, owner)[..., None] + torch.arange(b, device=q.device)
    place = place.clamp(max=S - 1)  # (B, G, n, b)
    queries = rows_at(q.reshape(B, G, -1, D), query.view(B, G, n, r))  # (B, G, n, r, D)
    y, log_weight = attend_to_part(queries, rows_at(k, place), rows_at(v, place))
    # 4. bring the results back
    row = torch.empty_like(row).scatter(2, order, row)  # (B, G, M)
    y = rows_at(y.flatten(2, 3), row).view(B, H, T, P, D)
    return y, log_weight.flatten(2).gather(2, row).view(B, H, T, P)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        D = config.head_dim
        self.config = config
        self.layer = layer
        self.head_dim = D
        self.wq = nn.Linear(C, config.n_head * D, bias=False)
        self.wk = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wv = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.wo = nn.Linear(config.n_head * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask=None, cache=None):
        """Returns (B, T, C) for x (B, T, C); rope is (cos, sin), mask the Blocks of GPT.positions_and_mask."""
        B, T, _ = x.shape
        # 1. project; -1 counts the heads, of which a device has a share where tensor parallelism splits them
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)  # (B, T, G, D)
        q, k = self.rotate(q, k, rope)
        # 2. attend, heads before time, some queries at a time
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)  # (B, G, T, D)
        v = v.transpose(1, 2)  # (B, G, T, D)
        if cache is None:
            means = block_means(k.detach(), mask.start, self.config.key_block)  # (B, G, N, D)
        else:
            k, v, means = cache.append(self.layer, k, v)  # (B, G, S, D), (B, G, N, D)
        y = []
        for first in range(0, T, QUERIES_AT_ONCE):
            some = slice(first, first + QUERIES_AT_ONCE)
            blocks = mask.of_queries(some)
            slots, chosen = choose_blocks(q[:, :, some], means, blocks, self.config)
            y.append(self.attend(q[:, :, some], k, v, blocks, slots, chosen))
        y = torch.cat(y, dim=2)  # (B, H, T, D)
        # 3. merge the heads
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def rotate(self, q, k, rope):
        """Returns q (B, T, H, D) and k (B, T, G, D), each head normed (QK-norm) and turned by its position."""
        q = apply_rope(self.q_norm(q), *rope)
        k = apply_rope(self.k_norm(k), *rope)
        return q, k

    def attend(self, q, k, v, blocks, slots, chosen):
        """Returns softmax attention (B, H, T, D) of q (B, H, T, D) to the k, v (B, G, S, D) that mask_of_blocks shows.

        H / G heads share a key, and each of them has its own choice.
        """
        n_keys = self.config.key_block * (1 + slots.size(3))
        if 5 * n_keys > k.size(2):  # to bring queries and blocks together would take longer than what it saves
            mask = mask_of_blocks(blocks, slots, chosen)
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.size(1) != k.size(1))
        return self.attend_gathered(q, k, v, blocks, slots, chosen)

    def attend_gathered(self, q, k, v, blocks, slots, chosen):
        """Returns what attend does from the keys of the chosen blocks alone."""
        b = self.config.key_block
        own, own_weight = attend_to_own(q, k, v, blocks, b)
        others, weights = attend_to_slots(q, k, v, blocks.start, slots, b)
        weights = weights.masked_fill(~chosen, -math.inf)
        share = torch.cat((own_weight[..., None], weights), dim=-1).softmax(dim=-1).to(v.dtype)  # (B, H, T, 1 + P)
        return share[..., :1] * own + (share[..., 1:, None] * others).sum(dim=3)

    def keys_seen(self, T):
        """Returns how many of T keys a query sees on average: of its own block so far, and of the chosen blocks."""
        b = self.config.key_block
        first = torch.arange(0, T, b, device="cpu")  # of each block, whose queries choose equally many
        doc_start = torch.zeros(1, T, dtype=torch.long, device="cpu")
        rule = static_blocks(blocks_of(first, doc_start, self.config), self.config)[0]  # (N', N)
        n_static = (rule == math.inf).sum(dim=-1)
        n_chosen = torch.minimum(n_static + self.config.top_k_block - 1, first // b)
        n_queries = (T - first).clamp(max=b)
        return (n_queries * b * n_chosen + n_queries * (n_queries + 1) / 2).sum().item() / T


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

    means[layer] (B, G, max_len / key_block, D) holds the mean key of each complete block.
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=None):
        shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        n_blocks = max_len // config.key_block
        shape = (batch_size, config.n_kv_head, n_blocks, config.head_dim)
        self.means = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.config = config
        self.max_len = max_len
        self.static = static
        self.length = 0
        if static:  # a number would be compiled into a step, and every length compiled anew
            self.length = torch.zeros((), dtype=torch.long, device=device)
        self.places = torch.arange(max_len, device=device)
        self.pad = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        if pad is not None:
            self.pad = self.pad + pad[:, None]
        self.doc_start = torch.zeros(batch_size, max_len, dtype=torch.long, device=device)

    def advance(self, idx):
        """Takes the next places for idx (B, T); returns positions and mask as GPT.positions_and_mask describes them."""
        B, T = idx.shape
        # A static length stands on the device, and to look at it would wait for all work there: its caller counts.
        too_long = not self.static and self.length + T > self.max_len
        if B != len(self.pad) or too_long:
            size = (len(self.pad), self.max_len)
            raise ValueError(f"{B} x ({int(self.length)} + {T}) tokens do not fit a cache of {size}")
        self.length += T
        place = self.last_places(T)  # (T,)
        # Where a token's document begins is the last of three: its own place if it is eot_id, the first place after the
        # padding, and where the document of the token before it begins. An empty cache says 0 at place 0.
        at_eot = torch.where(idx == self.config.eot_id, place, 0)  # (B, T)
        behind_padding = torch.where(place < self.pad, 0, self.pad)  # (B, T)
        previous = (place[:1] - 1).clamp(min=0)  # (1,), a tensor since a static length is one
        before = self.doc_start.index_select(1, previous)  # (B, 1)
        doc_start = torch.maximum(torch.maximum(at_eot, behind_padding), before).cummax(dim=1).values  # (B, T)
        self.doc_start.index_copy_(1, place, doc_start)
        return place - doc_start, blocks_of(place, self.doc_start[:, : self.n_keys()], self.config)

    def append(self, layer, k, v):
        """Writes k, v (B, G, T, D) at the places of the newest tokens; returns those of all so far, (B, G, S, D).

        And the means of their blocks (B, G, N, D). Only those of blocks that may have got their last token are new.
        """
        place = self.last_places(k.size(2))
        self.k[layer].index_copy_(2, place, k.type_as(self.k[layer]))
        self.v[layer].index_copy_(2, place, v.type_as(self.v[layer]))
        S = self.n_keys()
        k = self.k[layer][:, :, :S]
        v = self.v[layer][:, :, :S]
        b = self.config.key_block
        means = self.means[layer][:, :, : S // b]
        if S >= b:
            # Three new tokens at places 6, 7, 8, with b=4: stretch 1 is the last that is full. The block of slot 1 has
            # ended if it begins at place 4 or 5, that of slot 0 if it begins at 3: (3 + 2 * 4 - 2) // 4 = 2 slots.
            n_ended = (len(place) + 2 * b - 2) // b
            slot = (place[-1] + 1) // b - 1 - torch.arange(n_ended, device=k.device)
            slot = slot.clamp(min=0)
            start = block_starts(slot, self.doc_start[:, :S], b)
            means.index_copy_(2, slot, block_means(k.detach(), start, b))
        return k, v, means

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
        new.k = [k.repeat_interleave(n, dim=0) for k in self.k]
        new.v = [v.repeat_interleave(n, dim=0) for v in self.v]
        new.means = [mean.repeat_interleave(n, dim=0) for mean in self.means]
        new.pad = self.pad.repeat_interleave(n, dim=0)
        new.doc_start = self.doc_start.repeat_interleave(n, dim=0)
        new.length = self.length + 0  # a tensor of its own where it is one
        return new

    def bytes_per_token(self):
        return sum(x.nbytes for x in self.k + self.v + self.means) // self.doc_start.numel()


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
        """Returns each token's position in its document (B, T), and the Blocks that it may attend to.

        A cache takes places for idx here, before the layers append to it. Documents begin at eot_id, for example 9:
            idx 9 5 9 7  ->  doc_start 0 0 2 2  ->  positions 0 1 0 1;  the last token sees the last two
        """
        if cache is not None:
            return cache.advance(idx)
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}: give fewer")
        place = torch.arange(T, device=idx.device)
        doc_start = torch.where(idx == self.config.eot_id, place, 0).cummax(dim=1).values  # (B, T)
        return place - doc_start, blocks_of(place, doc_start, self.config)

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
    key_block=4, block_stride=4, n_global_block=1, top_k_block=3,
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
