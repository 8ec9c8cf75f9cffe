"""A mixture of experts of limited capacity: choices beyond it are dropped (https://arxiv.org/abs/2101.03961).

    s = softmax(Wr (noise u))             u = RMSNorm(x), noise: factors between 1 - router_jitter and 1 + router_jitter
    g_e = s_e / sum over chosen s         the gates, chosen: the K experts with the largest s_e + bias_e
    x = x + sum over chosen e with room for the token of g_e MLP_e(u)      (+ MLP_shared(u) with n_shared_expert > 0)
    room: an expert takes ceil(capacity_factor K T / E) choices of a sequence, its even share times the factor
    loss = cross-entropy + sum over layers of balance_loss E sum_e f_e P_e + z_loss mean logsumexp(Wr (noise u))^2

B  batch
T  time: the tokens of one call
S  time with the cached past
C  n_embd, the width of the residual stream
H  query heads
G  key/value heads
D  head_dim
V  vocabulary
E  experts
K  experts per token
N  B T, the tokens of one call in a row
L  layers with experts
f  each expert's share of the choices: no gradient
P  each expert's mean share of the scores: E sum_e f_e P_e is 1 when the load is even

Where each expert has a device of its own, a capacity bounds the device's work and memory
(https://arxiv.org/abs/2006.16668). Here a dropped choice is computed like all others and gets the gate 0: this file
shows what dropping does to learning, and saves no time. Noise and dropping are for training alone.
Dropping by score follows https://arxiv.org/abs/2106.05974, which ranks the tokens of a whole batch; here the choices of
one sequence are ranked. A later token can then push out an earlier one: in training such a model is not causal.

Differs from model_moe.py in: GPTConfig, Router, GPT.__init__, GPT.auxiliary_loss, GPT.metrics
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
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
    n_inner: int = 2048  # width of the MLP in layers without experts, about 8/3 n_embd
    n_expert: int = 32  # experts in a layer
    n_expert_per_token: int = 4  # experts that a token passes through
    n_expert_inner: int = 512  # width of an expert: 4 of 512 cost a token as much as one MLP of 2048
    n_shared_expert: int = 0  # shared experts, applied to every token, fused into one wider MLP
    shared_gate: bool = False  # scale the shared experts' output by a sigmoid of the token
    n_dense_layer: int = 0  # so many first layers have the plain MLP
    moe_every: int = 1  # 2 gives experts to every second layer: 1, 3, 5...
    moe_layers: list | tuple = ()  # exactly these layers have experts; empty: what n_dense_layer and moe_every say
    router_score: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid scores each expert by itself
    normalize_gates: bool = True  # the gates of a token sum to 1; a single one would always be 1, and teach nothing
    gate_scale: float = 1.0  # multiplies the gates: 2.5 in DeepSeek-V3
    router_jitter: float = 0.0  # in training the router's input is multiplied by 1 +- this at random: 0.01 is usual
    capacity_factor: float = 1.25  # an expert takes so many times its even share of a sequence's choices; 0 takes all
    drop_by: Literal["position", "score"] = "position"  # drops the last choices of a sequence, or the lowest gates
    n_group: int = 1  # groups that the experts are cut into, for example one for each machine
    n_group_per_token: int = 1  # groups that a token may choose in: those whose two best experts sum to most
    balance_loss: float = 0.01  # coefficient of the loss that evens the load: 0.001 to 0.1
    balance_over: Literal["global", "batch", "sequence"] = "sequence"  # evens the step, a micro-batch, each sequence
    z_loss: float = 0.001  # coefficient of the loss that keeps the router's logits small
    bias_rate: float = 0.0  # how far a step moves each bias against the load: 0.001, in place of balance_loss
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
        if self.rope_scaling not in ("none", "linear", "yarn", "llama3"):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} is unknown: try none, linear, yarn or llama3")
        if self.rope_scaling in ("yarn", "llama3") and self.rope_original < 1:
            needs = f"{self.rope_scaling} needs the trained length"
            raise ValueError(f"rope_original={self.rope_original}, and {needs}: try 4096")
        if self.router_score not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score={self.router_score!r} is unknown: try softmax or sigmoid")
        if self.drop_by not in ("position", "score"):
            raise ValueError(f"drop_by={self.drop_by!r} is unknown: try position or score")
        if self.balance_over not in ("global", "batch", "sequence"):
            raise ValueError(f"balance_over={self.balance_over!r} is unknown: try global, batch or sequence")
        if self.n_group < 1 or self.n_expert % self.n_group:
            raise ValueError(f"n_expert={self.n_expert} cannot be cut into n_group={self.n_group} groups: try 1")
        if not 1 <= self.n_group_per_token <= self.n_group:
            raise ValueError(f"n_group_per_token={self.n_group_per_token} is not from 1 to n_group={self.n_group}")
        n_open = self.n_expert // self.n_group * self.n_group_per_token
        if not 1 <= self.n_expert_per_token <= n_open:
            raise ValueError(
                f"n_expert_per_token={self.n_expert_per_token} is not from 1 to {n_open}: try fewer groups"
            )
        if self.moe_every < 1:
            raise ValueError(f"moe_every={self.moe_every} is not 1 or more: try 1")
        layers = range(self.n_dense_layer, self.n_layer)
        if not all(isinstance(layer, int) for layer in self.moe_layers):
            raise ValueError(f"moe_layers={self.moe_layers} are not all numbers of layers: try [1, 3]")
        if not self.moe_layers:
            self.moe_layers = [layer for layer in layers if (layer + 1) % self.moe_every == 0]
        self.moe_layers = sorted(set(self.moe_layers))
        if not self.moe_layers:
            raise ValueError(
                f"no layer has experts: lower n_dense_layer={self.n_dense_layer} or moe_every={self.moe_every}"
            )
        if self.moe_layers[0] < 0 or self.moe_layers[-1] >= self.n_layer:
            raise ValueError(f"moe_layers={self.moe_layers} are not all from 0 to {self.n_layer - 1}: leave some out")


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


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.w_gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.w_up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.w_down = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Router(nn.Module):
    """Scores the experts for each token and chooses K of them; its buffers hold what evens the load."""

    def __init__(self, config):
        super().__init__()
        E = config.n_expert
        self.config = config
        self.weight = nn.Parameter(torch.empty(E, config.n_embd))
        self.register_buffer("bias", torch.zeros(E))  # added to the scores for the choice alone
        self.register_buffer("load", torch.zeros(E, dtype=torch.long))  # choices of the last step, on all processes
        # Sums over the step so far, on this process: choices of each expert, and balance, z-loss and dropped share,
        # each of them a mean times the number of choices that it was taken over.
        self.register_buffer("step_load", torch.zeros(E, dtype=torch.long), persistent=False)
        self.register_buffer("step_losses", torch.zeros(3), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves the buffers with the weight but casts none: the bias would lose its small steps in bf16.

        Where they leave the meta device, which has no values, they begin at 0.
        """
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            device = getattr(self, name).device
            if buffer.is_meta:
                setattr(self, name, torch.zeros_like(buffer, device=device))
            else:
                setattr(self, name, buffer.to(device))
        return self

    def forward(self, x, padding):
        """Returns for x (B, T, C) the chosen experts and their gates (B, T, K), and in training the statistics."""
        logits, scores = self.score(x)  # (B, T, E)
        chosen = self.choose(scores)  # (B, T, K)
        gates = scores.gather(-1, chosen)
        if self.config.normalize_gates:
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        gates = gates * self.config.gate_scale
        if not self.training:
            return chosen, gates, None
        dropped = self.beyond_capacity(chosen, gates, padding)  # (B, T, K)
        gates = gates.masked_fill(dropped, 0.0)
        return chosen, gates, self.statistics(logits, scores, chosen, dropped, padding)

    def score(self, x):
        """Returns logits and scores (B, T, E), in fp32 at least: in bf16 experts would often tie."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        device_type = "cpu" if x.is_meta else x.device.type  # autocast does not know the meta device
        x = x.to(dtype)
        if self.training and self.config.router_jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.config.router_jitter, 1 + self.config.router_jitter)
        with torch.autocast(device_type, enabled=False):
            logits = F.linear(x, self.weight.to(dtype))
        if self.config.router_score == "softmax":
            return logits, logits.softmax(dim=-1)
        return logits, logits.sigmoid()

    def choose(self, scores):
        """Returns the K experts (B, T, K) of the largest biased scores, within each token's best groups."""
        choice = scores.detach() + self.bias
        if self.config.n_group > 1:
            groups = choice.unflatten(-1, (self.config.n_group, -1))  # (B, T, groups, E / groups)
            best_two = groups.topk(min(2, groups.size(-1))).values
            best = best_two.sum(dim=-1).topk(self.config.n_group_per_token).indices  # (B, T, n_group_per_token)
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)  # (B, T, groups)
            # Not 0, which is more than a score with a negative bias.
            choice = groups.masked_fill(closed[..., None], -math.inf).flatten(-2)
        return choice.topk(self.config.n_expert_per_token).indices

    def beyond_capacity(self, chosen, gates, padding):
        """Returns which of the choices (B, T, K) find their expert full; padding (B, T) takes no text's place.

        Each sequence has a capacity of its own, or a token's output would depend on the other sequences of the batch;
        its documents share it. A token's first choice has no precedence over another token's second. Four tokens that
        chose an expert with room for two, and their places in its queue:
            gate                 0.4 0.7 0.1 0.6
            place by position    0   1   2   3      the last two are dropped
            place by score       2   0   3   1      0.4 and 0.1 are dropped: 0.4 because of a later token
        """
        c = self.config
        B, T, K = chosen.shape
        if c.capacity_factor == 0:
            return torch.zeros_like(chosen, dtype=torch.bool)
        capacity = math.ceil(c.capacity_factor * K * T / c.n_expert)
        if c.drop_by == "score":
            worth = gates.detach()
        else:
            worth = torch.zeros_like(gates)  # the sort is stable: equals stay in the order of their positions
        # Padding stands behind all text, and before the tokens that did not choose the expert.
        worth = worth.masked_fill(padding[..., None], -1.0)
        queue = gates.new_full((B, T, c.n_expert), -math.inf).scatter(-1, chosen, worth)
        order = queue.argsort(dim=1, descending=True, stable=True)  # 1 3 0 2 in the example: who is first, second, ...
        place = order.argsort(dim=1)  # (B, T, E): 2 0 3 1, where each one stands
        return place.gather(-1, chosen) >= capacity

    def statistics(self, logits, scores, chosen, dropped, padding):
        """Returns how often each expert was chosen (E,), the balance loss, the z-loss and the dropped share.

        Padding (B, T) has no part in them: a sequence weighs as much as it has other tokens.
        Over "global" the balance loss takes the load of the last step, so that micro-batches change nothing; over
        "batch" it depends on how large a micro-batch is, and over "sequence" it wants each to use all experts.
        """
        E = self.config.n_expert
        text = (~padding).to(scores.dtype)  # (B, T), 1 where a token counts
        n = text.sum().clamp(min=1)
        text_choices = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * text[..., None]  # (B, T, E)
        load = text_choices.sum(dim=1)  # (B, E)
        share = scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)  # (B, T, E)
        P = (share * text[..., None]).sum(dim=1) / n  # (B, E): of each sequence, a part of the mean over all tokens
        if self.config.balance_over == "global":
            total = self.load.sum()
            f = torch.where(total > 0, self.load / total, 1 / E)  # (E,), uniform before the first step
        elif self.config.balance_over == "batch":
            f = load.sum(dim=0) / load.sum().clamp(min=1)  # (E,)
        else:
            f = load / load.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, E)
        balance = E * (f * P).sum()
        z = (logits.logsumexp(dim=-1).square() * text).sum() / n
        dropped_share = (dropped * text[..., None]).sum() / load.sum().clamp(min=1)
        return load.sum(dim=0), balance, z, dropped_share


def has_grouped_mm(x, weight):
    """Says whether F.grouped_mm takes x (n_rows, n_in) and weight (E, n_in, n_out) without waiting for the device."""
    whole = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])  # it wants rows of whole 16 bytes
    if x.is_cuda:
        hopper_or_newer = torch.cuda.get_device_properties(x.device).major >= 9
        return whole and hopper_or_newer and x.dtype == torch.bfloat16
    if x.dtype == torch.float32 and torch.compiler.is_compiling():
        return False
    return whole and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def grouped_matmul(x, weight, expert):
    """Returns row i of x (n_rows, n_in) times weight[expert[i]] of (E, n_in, n_out) for all rows: expert is sorted.

    Where torch has no such product, the rows are cut into blocks of b, each with rows of one expert only. With E = 3
    experts and b = 2 (in truth b would be 1 here):
        expert    0 0 0 2 2
        ends      3 3 5            of each expert's rows
        filler    1 0 0            so many rows fill each expert's last block
        place     0 1 2 4 5        of each row among the blocks; 3 is filler
        owner     0 0 2 0          the expert of each block; the last block is not needed
    """
    n_rows, n_in = x.shape
    E = len(weight)
    weight = weight.to(x.dtype)
    ends = torch.searchsorted(expert, torch.arange(E, device=x.device), right=True)  # (E,)
    if has_grouped_mm(x, weight):
        return F.grouped_mm(x, weight, offs=ends.int())
    b = -(-n_rows // (2 * E))  # half the mean load: smaller blocks have less filler, and more copies of weights
    n = E + (n_rows - E) // b  # the most blocks that can be needed: one an expert, and one for b rows beyond those
    filler = -ends.diff(prepend=ends.new_zeros(1)) % b  # (E,)
    place = torch.arange(n_rows, device=x.device) + (filler.cumsum(0) - filler)[expert]  # (n_rows,)
    owner = expert.new_zeros(n).scatter(0, place // b, expert)  # (n,)
    blocks = x.new_zeros(n * b, n_in).index_copy(0, place, x).view(n, b, n_in)
    y = torch.bmm(blocks, weight.index_select(0, owner))  # (n, b, n_out)
    return y.flatten(0, 1).index_select(0, place)


class ExpertLinear(nn.Module):
    """A linear map for each expert."""

    def __init__(self, n_expert, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, n_in, n_out))

    def forward(self, x, expert):
        return grouped_matmul(x, self.weight, expert)


class MoE(nn.Module):
    """SwiGLU experts, of which each token passes through K, and a shared one for all tokens."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        width = config.n_expert_inner
        self.router = Router(config)
        self.w_gate = ExpertLinear(config.n_expert, C, width)
        self.w_up = ExpertLinear(config.n_expert, C, width)
        self.w_down = ExpertLinear(config.n_expert, width, C)
        self.shared = None
        self.shared_router = None
        if config.n_shared_expert > 0:
            self.shared = MLP(replace(config, n_inner=config.n_shared_expert * width))
        if config.n_shared_expert > 0 and config.shared_gate:
            self.shared_router = nn.Linear(C, 1, bias=False)

    def forward(self, x, padding):
        """Returns the output (B, T, C) and, in training, the router's statistics, which leave padding (B, T) out."""
        chosen, gates, statistics = self.router(x, padding)  # (B, T, K), (B, T, K)
        flat = x.flatten(0, 1)  # (N, C)
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            flat = flat.to(torch.get_autocast_dtype(x.device.type))  # F.grouped_mm does not cast by itself
        y = self.experts(flat, chosen.flatten(0, 1), gates.flatten(0, 1)).view_as(x)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_router is not None:
                shared = shared * self.shared_router(x).sigmoid()
            y = y + shared
        return y, statistics

    def experts(self, x, chosen, gates):
        """Returns sum over k of gates[n, k] MLP_chosen[n, k](x[n]), (N, C), for x (N, C), chosen and gates (N, K).

        No shape depends on who is chosen, and nothing waits for the device. Three tokens of two choices each:
            chosen    2 0 | 0 1 | 0 2
            expert    0 0 0 1 2 2        the choices, sorted
            order     1 2 4 3 0 5        where each stood before
            token     0 1 2 1 0 2        order // 2: whose row it takes
            back      4 0 1 3 2 5        order.argsort(): where each choice stands now
        """
        N, K = chosen.shape
        # 1. sort the choices by expert
        expert, order = chosen.flatten().sort(stable=True)  # (N K,)
        rows = x.index_select(0, order // K)  # (N K, C)
        # 2. pass each expert's rows through it
        h = F.silu(self.w_gate(rows, expert)) * self.w_up(rows, expert)  # (N K, n_expert_inner)
        y = self.w_down(h, expert)  # (N K, C)
        # 3. bring the rows back to their tokens, weigh and add them
        back = order.argsort()
        y = y.index_select(0, back).view(N, K, -1)
        return (y * gates[..., None].to(y.dtype)).sum(dim=1)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if layer in config.moe_layers else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, padding, rope, mask=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, mask, cache))
        u = self.mlp_norm(x)
        if isinstance(self.mlp, MoE):
            y, statistics = self.mlp(u, padding)
        else:
            y = self.mlp(u)
            statistics = None
        return x + self.dropout(y), statistics


class KVCache:
    """Keys and values of the tokens so far, in buffers made once: k[layer] and v[layer] (B, G, max_len, D).

    A forward pass calls advance once, which takes places for its tokens; then each layer appends what belongs there.
    doc_start (B, max_len) holds for each place the place where its document begins; tokens see each other where it is
    equal. Padding at the left is a document of its own. Two rows, the second with pad=1; E is eot_id, - is padding:
        tokens       a b E c    - a b c
        doc_start    0 0 2 2    0 1 1 1
        position     0 1 0 1    0 0 1 2    place - doc_start
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=None):
        shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
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
        new.pad = self.pad.repeat_interleave(n, dim=0)
        new.doc_start = self.doc_start.repeat_interleave(n, dim=0)
        new.length = self.length + 0  # a tensor of its own where it is one
        return new

    def bytes_per_token(self):
        return sum(x.nbytes for x in self.k + self.v) // self.doc_start.numel()


class GPT(nn.Module):
    # Routers are for AdamW: a row is an expert's own vector, and no matrix that Muon should make orthogonal.
    OPTIMIZER = {"router": dict(method="adamw"), "shared_router": dict(method="adamw")}

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None  # tied: logits() takes the embedding
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.expert_load = None  # (L, E): choices of each expert in the last step
        self.router_losses = None  # (3,): balance, z-loss and dropped share of the last step, means over layers
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
            elif kind in ("embed", "lm_head", "wq", "wk", "wv", "w_gate", "w_up", "router", "shared_router"):
                p.normal_(0.0, std)
            else:
                raise ValueError(f"init_weights does not know {name}: say how it begins")

    def forward(self, idx, targets=None, cache=None, last_only=False, per_token=False):
        """Returns the logits (B, T, V) of idx (B, T), or with targets (B, T) the mean loss; targets of -1 are ignored.

        In training the loss has the auxiliary loss added. A cache holds the tokens before idx, and takes up idx.
        last_only: logits (B, 1, V) of the last token. per_token: the negative log-probability of each target (B, T), 0
        where ignored, and the auxiliary loss, which is 0 outside training.
        """
        positions, mask = self.positions_and_mask(idx, cache)
        rope = rope_cos_sin(positions, self.config)
        padding = self.padding(idx)  # (B, T)
        x = self.embed(idx)  # (B, T, C)
        if self.config.scale_embeddings:
            x = x * self.config.n_embd**0.5
        statistics = []
        for block in self.blocks:
            x, of_layer = block(x, padding, rope, mask, cache)
            statistics.append(of_layer)
        if last_only:
            x = x[:, -1:]
        x = self.norm(x)
        if targets is None:
            return self.logits(x)
        auxiliary = torch.zeros((), device=x.device)
        if self.training:
            auxiliary = self.auxiliary_loss(statistics)
        if per_token:
            return self.token_losses(x, targets), auxiliary
        return self.lm_loss(x, targets) + auxiliary

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

    def padding(self, idx):
        """Returns which of the tokens idx (B, T) fill up a row behind its text: eot_id before another, or at the end.

        They are routed like all others, but do not count in what evens the load. So does not a document of no tokens,
        nor one that begins with the last token of a row. With eot_id 9:
            idx 9 5 9 7 9 9  ->  padding 0 0 0 0 1 1;  nothing is padding where eot_id is -1
        """
        is_eot = idx == self.config.eot_id  # (B, T)
        no_text_after = F.pad(is_eot[:, 1:], (0, 1), value=True)  # (B, T)
        return is_eot & no_text_after

    def auxiliary_loss(self, statistics):
        """Returns the weighted sum of all balance and z-losses, and adds what the layers counted to their sums.

        Counting is not left to the layers: one that is recomputed for the backward pass would count twice.
        """
        total = 0.0
        for block, of_layer in zip(self.blocks, statistics):
            if of_layer is None:
                continue
            router = block.mlp.router
            load, balance, z, dropped = of_layer
            router.step_load += load.long()
            router.step_losses += torch.stack((balance, z, dropped)).detach() * load.sum()
            total = total + self.config.balance_loss * balance + self.config.z_loss * z
        return total

    @torch.no_grad()
    def after_step(self):
        """Ends an optimizer step: its load, of all processes, moves the biases and enters the next balance loss."""
        routers = [self.blocks[layer].mlp.router for layer in self.config.moe_layers]
        load = sum_over_processes(torch.stack([router.step_load for router in routers]))  # (L, E)
        losses = sum_over_processes(torch.stack([router.step_losses for router in routers]))  # (L, columns)
        for router, of_layer in zip(routers, load):
            router.load.copy_(of_layer)
            router.bias += self.config.bias_rate * (of_layer.float().mean() - of_layer).sign()
            router.step_load.zero_()
            router.step_losses.zero_()
        self.expert_load = load
        self.router_losses = losses.sum(dim=0) / load.sum().clamp(min=1)

    def metrics(self):
        """Returns what the last step did: the load of each expert (L, E), its entropy in each layer (log E when even),
        and how far the largest load is above the mean (0.5 is 50 %).

        Means over layers: both losses, without their coefficients, and the dropped share of the choices.
        """
        if self.expert_load is None:
            return {}
        share = self.expert_load / self.expert_load.sum(dim=-1, keepdim=True).clamp(min=1)  # (L, E)
        entropy = -torch.xlogy(share, share).sum(dim=-1)  # (L,)
        violation = share.max() * self.config.n_expert - 1
        names = [f"load_entropy_{layer}" for layer in self.config.moe_layers]
        names += ["load_violation", "balance_loss", "z_loss", "dropped_fraction"]
        values = torch.cat((entropy, violation[None], self.router_losses))
        return dict(zip(names, values.tolist())) | {"expert_load": self.expert_load.tolist()}

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


def sum_over_processes(x):
    """Returns x, in place, as the sum of that of all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


TINY = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=64, n_inner=160,
            n_dense_layer=1, n_expert=6, n_expert_per_token=2, n_expert_inner=80)  # fmt: skip

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
        model.after_step()
        losses.append(loss.item())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{model.new_cache(1, 8).bytes_per_token()} cache bytes per token")
    continued = model.generate(batch[:1, :8], 8, temperature=0)[0, 8:]
    print(f"greedy {continued.tolist()} of {batch[0, 8:16].tolist()}")
