"""A mixture of experts: each token passes through a few of many MLPs (https://arxiv.org/abs/2101.03961).

    s = softmax(Wr u) or sigmoid(Wr u)                        chosen: the K experts with the largest s_e + bias_e
    x = x + sum over chosen e of g_e MLP_e(u) + MLP_shared(u)               g_e = gate_scale s_e / sum over chosen s
    loss = cross-entropy + sum over layers of balance_loss E sum_e f_e P_e + z_loss mean logsumexp(Wr u)^2

u = RMSNorm(x), f_e is e's share of the choices (no gradient), P_e its mean share of the scores: E f P is 1 in balance.
B batch, T time, S time with the cached past, C n_embd, H query heads, G key/value heads, D head_dim, V vocabulary,
E experts, K experts per token, N = B T tokens, L layers with experts. Narrow and shared experts: arXiv 2401.06066;
sigmoid, groups and bias: 2412.19437, 2408.15664; the load of the global batch: 2501.11873; z-loss: 2202.08906.
Differs from model_baseline.py in: GPTConfig, Block, GPT.__init__, GPT.forward, GPT.metrics, hf_views, config_from_hf,
config_to_hf, Router, ExpertLinear, has_grouped_mm, MoE, GPT._apply, GPT.auxiliary_loss, GPT.after_step, sum_over_ranks
"""

import copy
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # 50,257 of GPT-2 rounded up to a multiple of 64: faster matmuls
    block_size: int = 1024  # the longest sequence
    n_layer: int = 12
    n_head: int = 12  # query heads
    n_kv_head: int = 4  # key/value heads: n_head is MHA, 1 is MQA, between is GQA
    head_dim: int = 64  # n_head * head_dim need not be n_embd
    n_embd: int = 768
    n_inner: int = 2048  # width of the MLP in layers without experts, about 8/3 n_embd
    n_expert: int = 32  # experts in a layer
    n_expert_per_token: int = 4
    n_expert_inner: int = 512  # width of an expert: 4 of 512 cost as much as one MLP of 2048
    n_shared_expert: int = 0  # further ones that every token passes through: one MLP, so many times as wide
    shared_gate: bool = False  # scale their output by a sigmoid of the token
    n_dense_layer: int = 0  # the first layers have the plain MLP
    moe_every: int = 1  # of the others, every n-th has experts
    moe_layers: list | tuple = ()  # exactly these have experts; empty: as the two above say
    router_score: str = "softmax"  # or sigmoid: each expert is scored by itself
    normalize_gates: bool = True  # the chosen experts' weights sum to 1
    gate_scale: float = 1.0  # and are multiplied by this: 2.5 in DeepSeek-V3
    n_group: int = 1  # experts stand in groups (a machine each, say)
    n_group_per_token: int = 1  # and a token chooses within its best groups: by the sum of their two best experts
    router_jitter: float = 0.0  # in training the router's input is multiplied by 1 +- this at random
    capacity_factor: float = 0.0  # in training an expert takes so many times its even share of a sequence; 0: all
    drop_by: str = "position"  # what is too much: the sequence's last choices, or those of the lowest score
    balance_loss: float = 0.01  # coefficient of the loss that evens the load: 0.001 to 0.1
    balance_over: str = "global"  # load of the step so far on all ranks; batch: of a micro-batch; or of each sequence
    z_loss: float = 0.001  # coefficient of the loss that keeps the router's logits small
    bias_rate: float = 0.0  # a step's change of each bias, against the load: 0.001, in place of balance_loss
    qk_norm: bool = True  # RMSNorm on each query and key head: attention logits stay small at high learning rates
    rope_theta: float = 10000.0  # wavelengths reach 2 pi theta tokens: 1e6 for long context
    rope_scaling: str = "none"  # stretch positions past the trained length: none, linear or yarn
    rope_factor: float = 1.0  # by how much: 4.0 is 4 times the trained length
    rope_original: int = 0  # the trained length (yarn)
    norm_eps: float = 1e-6
    tie_embeddings: bool = True  # the head is the embedding transposed
    scale_embeddings: bool = False  # multiply embeddings by sqrt(n_embd)
    logit_softcap: float = 0.0  # c > 0: logits become c * tanh(logits / c)
    dropout: float = 0.0  # on the output of each branch: for many epochs over little data
    init_std: float = 0.02  # of every matrix; those that write to the residual stream get 1 / sqrt(2 n_layer) of it
    zero_init_residual: bool = False  # those start at 0 instead, so that every block starts as the identity
    eot_id: int = -1  # the token that begins a document: nothing crosses it; -1: one document, the fast causal path

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: try 1 or n_head")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, and RoPE turns pairs: try {self.head_dim + 1}")
        if self.rope_scaling not in ("none", "linear", "yarn"):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} is unknown: try none, linear or yarn")
        if self.rope_scaling == "yarn" and self.rope_original < 1:
            raise ValueError(f"rope_original={self.rope_original}, and yarn needs the trained length: try 4096")
        E, K, groups, within = self.n_expert, self.n_expert_per_token, self.n_group, self.n_group_per_token
        if groups < 1 or E % groups or not 1 <= within <= groups or not 1 <= K <= E // groups * within:
            raise ValueError(f"n_expert_per_token={K} cannot be chosen in n_group_per_token={within} of "
                             f"n_group={groups} equal groups of n_expert={E}: try fewer, or 1 group")  # fmt: skip
        known = dict(router_score="softmax sigmoid", drop_by="position score", balance_over="global batch sequence")
        for name, values in known.items():
            if getattr(self, name) not in values.split():
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: try one of {values}")
        every = range(self.moe_every - 1, self.n_layer, self.moe_every) if self.moe_every > 0 else ()
        self.moe_layers = list(self.moe_layers) or [i for i in every if i >= self.n_dense_layer]
        if not self.moe_layers or not set(self.moe_layers) <= set(range(self.n_layer)):
            raise ValueError(f"moe_layers={self.moe_layers}: try one or more of 0 to {self.n_layer - 1}; if empty, "
                             f"lower n_dense_layer={self.n_dense_layer} or moe_every={self.moe_every}")  # fmt: skip


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (https://arxiv.org/abs/1910.07467); F.rms_norm computes in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return (F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


def rope_cos_sin(positions, config):
    """positions (..., T) -> cos, sin (..., T, 1, D/2) in fp32. YaRN: https://arxiv.org/abs/2309.00071, section 3."""
    D, theta, factor = config.head_dim, config.rope_theta, config.rope_factor
    i = torch.arange(D // 2, device=positions.device).float()
    inv_freq, stretch, magnitude = 1.0 / theta ** (2 * i / D), float(config.rope_scaling == "linear"), 1.0
    if config.rope_scaling == "yarn":
        # Pairs that turn over 32 times within the trained length are kept, those under once are stretched in full.
        low, high = (D * math.log(config.rope_original / (2 * math.pi * n)) / (2 * math.log(theta)) for n in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
        stretch = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
        magnitude = 0.1 * math.log(max(factor, 1.0)) + 1.0  # a longer context wants sharper attention
    inv_freq = inv_freq * (1 - stretch) + inv_freq / factor * stretch
    angle = positions[..., None, None].float() * inv_freq
    return angle.cos() * magnitude, angle.sin() * magnitude


def apply_rope(x, cos, sin):
    """Turns the pairs (x_i, x_{i + D/2}) of x (B, T, H, D) by their angles (https://arxiv.org/abs/2104.09864)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class KVCache:
    """Keys and values so far, preallocated: a layer's k, v (B, G, max_len, D). pad (B,) counts padding at the left."""

    def __init__(self, config, batch_size, max_len, pad=None, device=None, dtype=None):
        shape, layers = (batch_size, config.n_kv_head, max_len, config.head_dim), range(config.n_layer)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in layers] for _ in range(2))
        self.length, self.padded = 0, pad is not None
        pad = torch.zeros(batch_size, dtype=torch.long, device=device) if pad is None else pad
        self.start = torch.where(torch.arange(max_len, device=device) < pad[:, None], 0, pad[:, None])  # of documents

    def check(self, B, T):
        if B != self.start.size(0) or self.length + T > self.start.size(1):
            raise ValueError(f"{B} x ({self.length} + {T}) tokens do not fit a cache of {tuple(self.start.shape)}")

    def append(self, layer, k, v):
        """Writes k, v (B, G, T, D) behind a layer's past and returns past and present, (B, G, S, D)."""
        end = self.length + k.size(2)
        self.k[layer][:, :, self.length : end] = k
        self.v[layer][:, :, self.length : end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def branch(self, n):
        """A new cache in which each row stands n times in a row: n continuations of one prefill."""
        new = copy.copy(self)
        new.k, new.v = ([x.repeat_interleave(n, dim=0) for x in xs] for xs in (self.k, self.v))
        new.start = self.start.repeat_interleave(n, dim=0)
        return new

    def bytes_per_token(self):
        return sum(x.nbytes for x in self.k + self.v) // self.start.numel()


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, H, G, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim = layer, D
        self.wq = nn.Linear(C, H * D, bias=False)
        self.wk = nn.Linear(C, G * D, bias=False)
        self.wv = nn.Linear(C, G * D, bias=False)
        self.wo = nn.Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask=None, cache=None):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))  # (B, T, H or G, D)
        q, k = apply_rope(self.q_norm(q), *rope), apply_rope(self.k_norm(k), *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        causal = True if mask is None and T > 1 else False  # torch.compile wants a bool; one query sees all the past
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):  # SwiGLU (https://arxiv.org/abs/2002.05202)
    def __init__(self, config):
        super().__init__()
        self.w_gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.w_up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.w_down = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.register_buffer("bias", torch.zeros(config.n_expert))  # of the choice alone; moved by after_step alone

    def _apply(self, fn, recurse=True):
        """A cast leaves the bias in fp32: its steps would vanish in bf16. Off the meta device it begins at 0."""
        bias = self.bias
        super()._apply(fn, recurse)
        self.bias = torch.zeros_like(bias, device=self.bias.device) if bias.is_meta else bias.to(self.bias.device)
        return self

    def forward(self, x):
        """x (B, T, C) -> logits, scores (B, T, E); chosen experts, the weights of their outputs (B, T, K)."""
        c, exact = self.config, torch.promote_types(x.dtype, torch.float32)  # in bf16 experts would often tie
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(exact)
            if self.training and c.router_jitter > 0:
                x = x * torch.empty_like(x).uniform_(1 - c.router_jitter, 1 + c.router_jitter)
            logits = F.linear(x, self.weight.to(exact))
        scores = logits.softmax(dim=-1) if c.router_score == "softmax" else logits.sigmoid()
        choice = scores.detach() + self.bias
        if c.n_group > 1:
            groups = choice.unflatten(-1, (c.n_group, -1))  # (B, T, groups, E / groups)
            best = groups.topk(min(2, groups.size(-1))).values.sum(dim=-1).topk(c.n_group_per_token).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            choice = groups.masked_fill(closed[..., None], -math.inf).flatten(-2)  # not 0: choices may be negative
        experts = choice.topk(c.n_expert_per_token).indices
        gates = scores.gather(-1, experts)
        if c.normalize_gates:
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return logits, scores, experts, gates * c.gate_scale


class ExpertLinear(nn.Module):
    def __init__(self, n_expert, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_in, n_out))

    def forward(self, x, group):
        """x: rows (R, in), those of expert e up to group[e]; or blocks (n, b, in), the i-th one of expert group[i]."""
        weight = self.weight.to(x.dtype)
        return F.grouped_mm(x, weight, offs=group) if x.ndim == 2 else torch.bmm(x, weight.index_select(0, group))


def has_grouped_mm(x, training, *widths):
    """In bf16 on GPUs since Hopper and on CPUs; elsewhere it is missing, or a loop that waits for the device."""
    if x.is_cuda:
        fast = x.dtype == torch.bfloat16 and torch.cuda.get_device_properties(x.device).major >= 9
    else:  # in fp32 a row's rounding depends on how many there are, and torch.compile refuses it
        fp32 = x.dtype == torch.float32 and training and not torch.compiler.is_compiling()
        fast = x.device.type == "cpu" and (x.dtype == torch.bfloat16 or fp32)
    return fast and all(width * x.element_size() % 16 == 0 for width in widths)  # it wants rows of whole 16 bytes


class MoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, C, width, n_shared = config.n_expert, config.n_embd, config.n_expert_inner, config.n_shared_expert
        self.config, self.router = config, Router(config)
        self.w_gate = ExpertLinear(E, C, width)
        self.w_up = ExpertLinear(E, C, width)
        self.w_down = ExpertLinear(E, width, C)
        self.shared = MLP(replace(config, n_inner=n_shared * width)) if n_shared else None
        self.shared_router = nn.Linear(C, 1, bias=False) if n_shared and config.shared_gate else None

    def forward(self, x):
        """x (B, T, C) -> y (B, T, C) and what `auxiliary_loss` wants. No shape depends on data: no loop, no waiting."""
        c, T = self.config, x.size(1)
        # 1. route
        logits, scores, experts, gates = self.router(x)
        chosen = torch.zeros_like(scores, dtype=torch.long).scatter(-1, experts, 1)  # (B, T, E)
        routing = None
        if self.training:
            # 2. drop; each sequence has its own capacity, or a token would depend on what else is in the batch
            dropped = torch.zeros_like(experts, dtype=torch.bool)
            if c.capacity_factor > 0:
                capacity = math.ceil(c.capacity_factor * c.n_expert_per_token * T / c.n_expert)
                worth = gates.detach() if c.drop_by == "score" else torch.zeros_like(gates)
                queue = torch.full_like(scores, -math.inf).scatter(-1, experts, worth)  # (B, T, E)
                queue = queue.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # stable: ties go by position
                dropped = queue.gather(-1, experts) >= capacity  # (B, T, K)
            gates = gates.masked_fill(dropped, 0.0)
            share = (scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)).mean(dim=1)  # (B, E)
            routing = chosen.sum(dim=1), share, logits.logsumexp(dim=-1).square().mean(), dropped.sum()
        y = self.mixture(x, experts, gates, chosen)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_router is None else self.shared_router(x).sigmoid() * shared)
        return y, routing

    def mixture(self, x, experts, gates, chosen):
        """The experts' outputs, weighted and summed: x (B, T, C), experts and gates (B, T, K), chosen (B, T, E)."""
        (B, T, C), (K, E), kind = x.shape, (experts.size(-1), chosen.size(-1)), x.device.type
        # 3. dispatch: copies of the tokens, sorted by expert, each expert's padded to whole blocks of b rows. With the
        # mean load as b, that is 2 E blocks at most. grouped_mm needs no padding.
        rows = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        N, grouped = B * T, has_grouped_mm(rows, self.training, C, self.config.n_expert_inner)
        b = 1 if grouped else -(-N * K // E)
        n = N * K if b == 1 else E + (N * K - E) // b  # blocks: with the fewest full ones there can be
        experts, chosen = experts.view(N, K), chosen.view(N, E)
        blocks = (chosen.sum(dim=0) + b - 1) // b  # (E,)
        first = blocks.cumsum(0) - blocks  # (E,): each expert's first block
        place = (first * b + chosen.cumsum(0) - 1).gather(1, experts).flatten()  # (N K,): where a copy goes
        source = place.new_zeros(n * b).scatter_(0, place, torch.arange(N * K, device=x.device) // K)
        h = rows.reshape(N, C).index_select(0, source)  # (n b, C); padding copies token 0, and nobody reads it
        # 4. experts
        group = (first + blocks).int()
        if not grouped:
            h, block = h.view(n, b, C), torch.arange(n, device=x.device)
            group = torch.searchsorted(first, block, right=True) - 1  # (n,): the block's expert
        h = self.w_down(F.silu(self.w_gate(h, group)) * self.w_up(h, group), group)
        # 5. combine
        h = h.view(n * b, C).index_select(0, place).view(B, T, K, C)
        return (h * gates.to(h.dtype)[..., None]).sum(dim=2)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if layer in config.moe_layers else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, mask, cache))
        u = self.mlp_norm(x)
        y, routing = self.mlp(u) if isinstance(self.mlp, MoE) else (self.mlp(u), None)
        return x + self.dropout(y), routing


class GPT(nn.Module):
    OPTIMIZER = {"router": dict(method="adamw"), "shared_router": dict(method="adamw")}  # no Muon for routers

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Of the step so far: choices of each expert, in the last column those dropped; sums of the loss terms.
        self.register_buffer("load", torch.zeros(len(config.moe_layers), config.n_expert + 1).long(), persistent=False)
        self.register_buffer("terms", torch.zeros(3), persistent=False)
        self.expert_load = None  # (L, E), of the last step
        self.init_weights()

    def _apply(self, fn, recurse=True):
        """Off the meta device the counts begin at 0."""
        begin = self.load.is_meta
        super()._apply(fn, recurse)
        for counts in (self.load, self.terms) if begin else ():
            counts.zero_()
        return self

    @torch.no_grad()
    def init_weights(self):
        residual_scale = 0.0 if self.config.zero_init_residual else (2 * self.config.n_layer) ** -0.5
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            else:
                scale = residual_scale if name.endswith(("wo.weight", "w_down.weight")) else 1.0
                p.normal_(0.0, self.config.init_std * scale)

    def forward(self, idx, targets=None, cache=None, last_only=False):
        """idx (B, T) -> logits (B, T, V); with targets (B, T) -> the mean loss, a scalar; targets of -1 are ignored.

        A cache holds the tokens before idx, and idx is appended to it. last_only: logits (B, 1, V) of the last token.
        """
        positions, mask = self.positions_and_mask(idx, cache)
        rope = rope_cos_sin(positions, self.config)
        x = self.embed(idx)  # (B, T, C)
        if self.config.scale_embeddings:
            x = x * self.config.n_embd**0.5
        routing = []
        for block in self.blocks:
            x, stats = block(x, rope, mask, cache)
            routing += [stats] if stats else []
        if cache is not None:
            cache.length += idx.size(1)
        x = self.norm(x[:, -1:] if last_only else x)
        if targets is None:
            return self.logits(x)
        return self.lm_loss(x, targets) + (self.auxiliary_loss(routing) if self.training else 0.0)

    def positions_and_mask(self, idx, cache):
        """Positions (T,) or (B, T) in the document, and a bool mask of the keys that each query sees (None: causal)."""
        (B, T), past = idx.shape, 0
        if cache is not None:
            cache.check(B, T)
            past = cache.length
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens are more than block_size={self.config.block_size}: give fewer")
        t, s = torch.arange(past, past + T, device=idx.device), torch.arange(past + T, device=idx.device)
        if self.config.eot_id < 0 and not (cache is not None and cache.padded):
            return t, None if past == 0 or T == 1 else s <= t[:, None]  # (T,), (T, S)
        # A document is known by where it begins: padding by 0, what follows it by the number of padding tokens.
        start = torch.where(idx == self.config.eot_id, t, 0)  # (B, T)
        start = start if cache is None else torch.maximum(start, cache.start[:, past : past + T])
        start = seen = start.cummax(dim=1).values
        if cache is not None:
            cache.start[:, past : past + T] = start
            cache.start[:, past + T :].clamp_(min=start[:, -1:])
            seen = cache.start[:, : past + T]  # (B, S)
        mask = (start[:, :, None] == seen[:, None, :]) & (s <= t[:, None])  # (B, T, S)
        return t - start, mask[:, None]  # (B, T), (B, 1, T, S)

    def logits(self, x):
        logits, cap = F.linear(x, (self.lm_head or self.embed).weight), self.config.logit_softcap  # (B, T, V)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def lm_loss(self, x, targets):
        """Cross-entropy in fp32 of the final hidden states x (B, T, C) against targets (B, T)."""
        return F.cross_entropy(self.logits(x).flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def auxiliary_loss(self, routing):
        """Balance and z-loss, summed over layers. The load is counted here: a recomputed block would count it twice."""
        c = self.config
        load, share, z, dropped = (torch.stack(values) for values in zip(*routing))  # (L, B, E) twice, (L,) twice
        self.load.add_(torch.cat((load.sum(dim=1), dropped[:, None]), dim=1))
        if c.balance_over == "batch":
            load = load.sum(dim=1, keepdim=True)  # (L, 1, E)
        elif c.balance_over == "global":
            load = sum_over_ranks(self.load[:, None, :-1].clone())  # (L, 1, E)
        fraction = load / load.sum(dim=-1, keepdim=True)
        balance = c.n_expert * (fraction * share).sum(dim=-1).mean(dim=1)  # (L,)
        self.terms.add_(torch.stack((balance.mean(), z.mean(), torch.ones_like(z[0]))).detach())
        return c.balance_loss * balance.sum() + c.z_loss * z.sum()

    @torch.no_grad()
    def after_step(self):
        """To be called after each optimizer step: moves the biases by the load of the whole step, on all ranks."""
        load, self.step_terms = sum_over_ranks(self.load.clone()), sum_over_ranks(self.terms.clone())
        self.expert_load, self.dropped = load[:, :-1], load[:, -1]
        for layer, load in zip(self.config.moe_layers, self.expert_load):
            direction = (load.sum() - self.config.n_expert * load).sign()
            self.blocks[layer].mlp.router.bias += self.config.bias_rate * direction
        self.load.zero_()
        self.terms.zero_()

    def new_cache(self, batch_size, max_len, pad=None):
        return KVCache(self.config, batch_size, max_len, pad, self.embed.weight.device, self.embed.weight.dtype)

    # Here ends the architecture. What follows is the same in every file, but for the names of weights at the end.
    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop=(), num_samples=1,
        crop=False, use_cache=True, generator=None,
    ):  # fmt: skip
        """Yields the next token of every row, (B * num_samples,), as they come; -1 in rows that have met a stop token.

        idx: ids (B, T), or a list of B prompts of any lengths, padded at the left. temperature=0 is greedy, top_k=0 and
        top_p=1 are off; num_samples continues each prompt that often from one prefill. Past block_size it is an error,
        unless crop=True: each token is then predicted from the last block_size ones by a full forward.
        """
        prompts = idx.tolist() if torch.is_tensor(idx) else [list(prompt) for prompt in idx]
        if not prompts or not all(prompts):
            raise ValueError("an empty prompt: begin with a token, for example the one that begins a document")
        device, block_size, longest = self.embed.weight.device, self.config.block_size, max(map(len, prompts))
        if longest + max_new_tokens - 1 > block_size and not crop:  # the last token is never fed back
            raise ValueError(f"{longest} + {max_new_tokens} tokens do not fit block_size={block_size}: try crop=True")
        idx = torch.tensor([p[:1] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)
        done = torch.zeros(len(prompts) * num_samples, dtype=torch.bool, device=device)
        stop = torch.tensor(list(stop), dtype=torch.long, device=device)
        for step in range(max_new_tokens):
            lost = max(idx.size(1) - block_size, 0)
            if step == 0 or lost > 0 or not use_cache:
                left = (pad - lost).clamp(min=0) if min(map(len, prompts)) < longest else None
                cache = self.new_cache(len(idx), min(longest + max_new_tokens, block_size), left)
            logits = self(idx[:, lost + cache.length :], cache=cache, last_only=True)[:, -1]  # (B, V)
            if step == 0 and num_samples > 1:
                logits, idx, pad = (x.repeat_interleave(num_samples, dim=0) for x in (logits, idx, pad))
                cache = cache.branch(num_samples)
            token = pick_token(logits, idx, temperature, top_k, top_p, repetition_penalty, generator)
            done |= torch.isin(token, stop)
            if done.all():
                return
            yield torch.where(done, -1, token)
            idx = torch.cat((idx, token[:, None]), dim=1)

    def generate(self, idx, max_new_tokens, num_samples=1, **options):
        """The new tokens of every row as lists, without the stop token that ended them; options as in `stream`."""
        columns = [c.tolist() for c in self.stream(idx, max_new_tokens, num_samples=num_samples, **options)]
        return [[c[row] for c in columns if c[row] >= 0] for row in range(len(idx) * num_samples)]

    def metrics(self):
        """Of the last step: each layer's entropy of the load (log E in balance), the largest load / mean load - 1, the
        fraction of choices dropped, the loss terms as means over layers. `expert_load` (L, E) is the load itself.
        """
        if self.expert_load is None:
            return {}
        share = self.expert_load / self.expert_load.sum(dim=-1, keepdim=True)  # (L, E)
        entropy, violation = -torch.xlogy(share, share).sum(dim=-1), share.max() * self.config.n_expert - 1
        dropped, terms = self.dropped.sum() / self.expert_load.sum(), self.step_terms[:2] / self.step_terms[2]
        names = [f"load_entropy_{layer}" for layer in self.config.moe_layers]
        names += ["load_violation", "dropped_fraction", "balance_loss", "z_loss"]
        return dict(zip(names, torch.cat((entropy, torch.stack((violation, dropped)), terms)).tolist()))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """A model from a Hugging Face folder: config.json and *.safetensors, sharded or not. Nothing is unpickled."""
        import safetensors.torch

        config = config_from_hf(json.loads((Path(folder) / "config.json").read_text()))
        with torch.device("meta"):
            model = cls(config).to(dtype)
        missing = hf_views(model.to_empty(device=device))
        for file in sorted(Path(folder).glob("*.safetensors")):
            try:
                tensors = safetensors.torch.load_file(file)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{file} is damaged or cut short ({error}): fetch it again") from error
            for name, tensor in tensors.items():
                view = missing.pop(name if name in missing else HF_PREFIX + name, None)
                if view is not None and tensor.shape == view.shape:
                    view.copy_(tensor)
                elif view is not None or not name.endswith(HF_IGNORED):
                    raise ValueError(f"{file}: {name} is {tensor.shape}, not {getattr(view, 'shape', 'in this model')}")
        if missing:  # pickled weights (.bin) are not read
            raise ValueError(f"{folder}/*.safetensors lack {len(missing)} weights: {', '.join(list(missing)[:5])}")
        return model.eval()

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors as transformers' AutoModelForCausalLM reads them."""
        import safetensors.torch

        folder, config = Path(folder), json.dumps(config_to_hf(self.config), indent=2)
        if any(folder.glob("*.safetensors")):
            raise FileExistsError(f"{folder} holds a model already: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: view.contiguous() for name, view in hf_views(self).items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(config)


def sum_over_ranks(x):
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def pick_token(logits, idx, temperature, top_k, top_p, repetition_penalty, generator):
    """logits (B, V) and the tokens so far (B, S) -> the next token (B,)."""
    logits = logits.float()
    if repetition_penalty != 1.0:  # https://arxiv.org/abs/1909.05858: what was said becomes less likely
        said = logits.gather(1, idx)
        logits = logits.scatter(1, idx, torch.where(said > 0, said / repetition_penalty, said * repetition_penalty))
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        probs[:, top_k:] = 0.0
    if top_p < 1:  # the smallest set that reaches top_p of what is left
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p * probs.sum(dim=-1, keepdim=True), 0.0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def hf_views(model):
    """{Hugging Face's name: our weight, seen in its shape there}: copying into a view loads, reading it saves."""
    views = {}
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES:
            name = re.sub(ours, theirs, name)
        if p.ndim == 3:
            views |= {name.replace(".mlp.", f".mlp.experts.{e}."): w.t() for e, w in enumerate(p.data)}
        else:
            views[name] = p.data
    if any(bias.any() for name, bias in model.named_buffers() if name.endswith("router.bias")):
        raise ValueError("Qwen3-MoE has no router bias, and it is not 0 here: this model cannot be saved as one")
    return views


def config_from_hf(hf):
    hf = hf | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})  # as transformers 4 and 5 write them
    for key, value in (HF_FIXED | HF_YARN).items():
        if hf.get(key, value) != value:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")
    hf = {"num_experts": hf.get("num_local_experts")} | hf  # as transformers 5 calls it
    fields = {ours: hf[theirs] for ours, theirs in HF_FIELDS.items()}
    layers, every, dense = range(fields["n_layer"]), hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    fields["moe_layers"] = [i for i in layers if (i + 1) % every == 0 and i not in dense]
    scaling = hf.get("rope_type", hf.get("type", "default"))
    if scaling != "default":
        fields |= dict(rope_scaling=scaling, rope_factor=hf["factor"])
        fields |= dict(rope_original=hf.get("original_max_position_embeddings", 0))
    return GPTConfig(**fields)


def config_to_hf(config):
    for key, value in (HF_NEEDS | dict(qk_norm=True, scale_embeddings=False, logit_softcap=0.0)).items():
        if getattr(config, key) != value:
            raise ValueError(f"Qwen3-MoE has no {key}={getattr(config, key)}: this model cannot be saved as one")
    hf = HF_FIXED | {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    if config.rope_scaling != "none":
        original = {"original_max_position_embeddings": config.rope_original} if config.rope_original else {}
        hf["rope_scaling"] = dict(rope_type=config.rope_scaling, factor=config.rope_factor) | original
    dense = sorted(set(range(config.n_layer)) - set(config.moe_layers))
    return hf | dict(architectures=["Qwen3MoeForCausalLM"], decoder_sparse_step=1, mlp_only_layers=dense)


HF_PREFIX, HF_IGNORED = "model.", ("lm_head.weight", "inv_freq")  # may be absent; copies of what is here already
HF_NAMES = [("^embed", "model.embed_tokens"), ("^blocks", "model.layers"), ("^norm", "model.norm"),
            ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"), (r"\.attn\.", ".self_attn."),
            (r"\.w([qkvo])\.", r".\1_proj."), (r"\.w_(gate|up|down)\.", r".\1_proj."), ("router", "gate")]  # fmt: skip
HF_FIELDS = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                 n_embd="hidden_size", n_inner="intermediate_size", block_size="max_position_embeddings",
                 vocab_size="vocab_size", head_dim="head_dim", norm_eps="rms_norm_eps", rope_theta="rope_theta",
                 tie_embeddings="tie_word_embeddings", n_expert="num_experts", n_expert_per_token="num_experts_per_tok",
                 n_expert_inner="moe_intermediate_size", normalize_gates="norm_topk_prob")  # fmt: skip
HF_FIXED = dict(model_type="qwen3_moe", hidden_act="silu", attention_bias=False, use_sliding_window=False)
HF_NEEDS = dict(n_shared_expert=0, router_score="softmax", gate_scale=1.0, n_group=1)
HF_YARN = dict(beta_fast=32, beta_slow=1, truncate=True, attention_factor=None, mscale=None, mscale_all_dim=None)

if __name__ == "__main__":  # overfit one batch for 20 steps, then continue its first tokens
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=64, n_inner=160)
    sizes |= dict(n_expert=8, n_expert_per_token=2, n_expert_inner=80)
    model, batch, losses = GPT(GPTConfig(**sizes)), torch.randint(256, (4, 33)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        losses.append(model(batch[:, :-1], batch[:, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        model.after_step()
    size, cache_bytes = sum(p.numel() for p in model.parameters()), model.new_cache(1, 8).bytes_per_token()
    print(f"{size:,} parameters, {cache_bytes} cache bytes per token, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"greedy {model.generate(batch[:1, :8], 8, temperature=0)[0]} of {batch[0, 8:16].tolist()}")
