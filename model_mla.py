"""Multi-head latent attention (https://arxiv.org/abs/2405.04434): attention from one small latent per token.

    c = norm(Wkv_down u), r = rope(Wk_rope u)          all that a token leaves in the cache: R + D numbers
    [n, p] = Wq norm(Wq_down u)                        a query of each head: N numbers without position, D with
    expanded: y = softmax([n, rope(p)] [Wk c, r]^T / sqrt(N + D)) Wv c      with keys and values of each head
    absorbed: y = Wv softmax([Wk^T n, rope(p)] [c, r]^T / sqrt(N + D)) c    the same with the latents themselves
    x = x + Wo y, then x = x + Wdown (silu(Wgate u) * (Wup u))              u = RMSNorm(x)

B batch, T time, S time with the cached past, C n_embd, H heads, R kv_rank, N nope_dim, D rope_dim, M v_dim,
V vocabulary.
Differs from model_baseline.py in: GPTConfig, rope_cos_sin, KVCache, Attention, hf_views, config_from_hf, config_to_hf,
Reordered
"""

import copy
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # 50,257 of GPT-2 rounded up to a multiple of 64: faster matmuls
    block_size: int = 1024  # the longest sequence
    n_layer: int = 12
    n_head: int = 12  # each has keys and values of its own, made from the latent
    kv_rank: int = 128  # size of the latent that all keys and values are made from, and that the cache holds
    q_rank: int = 0  # size of the latent that all queries are made from, say 3 * kv_rank; 0: made from x itself
    nope_dim: int = 64  # numbers of a head's query and key that know no position
    rope_dim: int = 32  # and that RoPE turns: such a key is one for all heads, cached beside the latent
    v_dim: int = 64  # numbers of a head's value
    n_embd: int = 768
    n_inner: int = 2048  # width of the MLP, about 8/3 n_embd
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
        for name, least in dict(n_head=1, kv_rank=1, q_rank=0, nope_dim=1, rope_dim=2, v_dim=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}: try {getattr(GPTConfig, name)}")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} is odd, and RoPE turns pairs: try {self.rope_dim + 1}")
        if self.rope_scaling not in ("none", "linear", "yarn"):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} is unknown: try none, linear or yarn")
        if self.rope_scaling == "yarn" and self.rope_original < 1:
            raise ValueError(f"rope_original={self.rope_original}, and yarn needs the trained length: try 4096")


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
    D, theta, factor = config.rope_dim, config.rope_theta, config.rope_factor
    i = torch.arange(D // 2, device=positions.device).float()
    inv_freq, stretch = 1.0 / theta ** (2 * i / D), float(config.rope_scaling == "linear")
    if config.rope_scaling == "yarn":
        # Pairs that turn over 32 times within the trained length are kept, those under once are stretched in full.
        low, high = (D * math.log(config.rope_original / (2 * math.pi * n)) / (2 * math.log(theta)) for n in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
        stretch = ((i - low) / max(high - low, 0.001)).clamp(0, 1)
    inv_freq = inv_freq * (1 - stretch) + inv_freq / factor * stretch
    angle = positions[..., None, None].float() * inv_freq
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """Turns the pairs (x_i, x_{i + D/2}) of x (B, T, H, D) by their angles (https://arxiv.org/abs/2104.09864)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class KVCache:
    """Latents and rotated keys so far, preallocated: a layer's kv (B, max_len, R + D). pad (B,) counts left padding."""

    def __init__(self, config, batch_size, max_len, pad=None, device=None, dtype=None):
        shape = (batch_size, max_len, config.kv_rank + config.rope_dim)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length, self.padded = 0, pad is not None
        pad = torch.zeros(batch_size, dtype=torch.long, device=device) if pad is None else pad
        self.start = torch.where(torch.arange(max_len, device=device) < pad[:, None], 0, pad[:, None])  # of documents

    def check(self, B, T):
        if B != self.start.size(0) or self.length + T > self.start.size(1):
            raise ValueError(f"{B} x ({self.length} + {T}) tokens do not fit a cache of {tuple(self.start.shape)}")

    def append(self, layer, kv):
        """Writes kv (B, T, R + D) behind a layer's past and returns past and present, (B, S, R + D)."""
        end = self.length + kv.size(1)
        self.kv[layer][:, self.length : end] = kv
        return self.kv[layer][:, :end]

    def branch(self, n):
        """A new cache in which each row stands n times in a row: n continuations of one prefill."""
        new = copy.copy(self)
        new.kv = [kv.repeat_interleave(n, dim=0) for kv in self.kv]
        new.start = self.start.repeat_interleave(n, dim=0)
        return new

    def bytes_per_token(self):
        return sum(kv.nbytes for kv in self.kv) // self.start.numel()


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, H, R, Q = config.n_embd, config.n_head, config.kv_rank, config.q_rank
        N, D, M = config.nope_dim, config.rope_dim, config.v_dim
        self.layer, self.nope_dim, self.rope_dim, self.scale = layer, N, D, (N + D) ** -0.5
        if config.rope_scaling == "yarn":  # a longer context wants sharper attention, also where RoPE turns nothing
            self.scale *= (0.1 * math.log(max(config.rope_factor, 1.0)) + 1.0) ** 2
        self.wq_down = nn.Linear(C, Q, bias=False) if Q else nn.Identity()
        self.q_norm = RMSNorm(Q, 1e-6) if Q else nn.Identity()  # DeepSeek's latents do not follow norm_eps
        self.wq = nn.Linear(Q or C, H * (N + D), bias=False)
        self.wkv_down = nn.Linear(C, R, bias=False)
        self.kv_norm = RMSNorm(R, 1e-6)
        self.wk_rope = nn.Linear(C, D, bias=False)
        self.wk = nn.Linear(R, H * N, bias=False)
        self.wv = nn.Linear(R, H * M, bias=False)
        self.wo = nn.Linear(H * M, C, bias=False)

    def forward(self, x, rope, mask=None, cache=None):
        B, T, _ = x.shape
        # 1. a query of each head
        q = self.wq(self.q_norm(self.wq_down(x))).view(B, T, -1, self.nope_dim + self.rope_dim)  # (B, T, H, N + D)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        q_rope = apply_rope(q_rope, *rope)
        # 2. one latent and one rotated key of each token
        k_rope = apply_rope(self.wk_rope(x)[:, :, None], *rope)[:, :, 0]  # (B, T, D)
        kv = torch.cat((self.kv_norm(self.wkv_down(x)), k_rope), dim=-1)  # (B, T, R + D)
        if cache is not None:
            kv = cache.append(self.layer, kv)  # (B, S, R + D)
        # 3. attention: for one query it is not worth making keys and values of the whole past
        attend = self.absorbed if T == 1 else self.expanded
        return self.wo(attend(q_nope, q_rope, kv, mask).flatten(2))  # (B, T, C)

    def expanded(self, q_nope, q_rope, kv, mask):
        """Attention of each head to keys and values of its own, made from the latents: (B, T, H, M)."""
        (B, S, _), (T, H) = kv.shape, q_nope.shape[1:3]
        latent, k_rope = kv[..., : -self.rope_dim], kv[..., None, -self.rope_dim :]  # (B, S, R), (B, S, 1, D)
        k_nope, v = (w(latent).view(B, S, H, -1) for w in (self.wk, self.wv))  # (B, S, H, N or M)
        q, k = torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope.expand(-1, -1, H, -1)), dim=-1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, N + D or M)
        causal = True if mask is None and T > 1 else False  # torch.compile wants a bool; one query sees all the past
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale).transpose(1, 2)

    def absorbed(self, q_nope, q_rope, kv, mask):
        """The same for T = 1 from the latents as they are: n . Wk c = Wk^T n . c, and sum p Wv c = Wv sum p c."""
        wk, wv = (w.weight.unflatten(0, (q_nope.size(2), -1)) for w in (self.wk, self.wv))  # (H, N or M, R)
        q = torch.cat((torch.einsum("bthn,hnr->bthr", q_nope, wk), q_rope), dim=-1)  # (B, 1, H, R + D)
        kv = kv[:, None]  # (B, 1, S, R + D): keys and values of one head, for which the H heads of q are H queries
        y = F.scaled_dot_product_attention(q, kv, kv, mask, scale=self.scale)  # kv whole as values: no copy of it
        return torch.einsum("bthr,hmr->bthm", y[..., : -self.rope_dim], wv)  # (B, 1, H, M)


class MLP(nn.Module):  # SwiGLU (https://arxiv.org/abs/2002.05202)
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
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

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
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += idx.size(1)
        x = self.norm(x[:, -1:] if last_only else x)
        return self.logits(x) if targets is None else self.lm_loss(x, targets)

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
        """What a training step should log beside the loss: {name: float}."""
        return {}

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


class Reordered:
    """A weight of the file whose rows are those of some of ours in another order: what no view can say."""

    def __init__(self, order, *weights):
        self.order, self.weights = order, weights
        self.shape = torch.Size((len(order), weights[0].size(1)))

    def copy_(self, tensor):
        parts = tensor[self.order.argsort()].split([len(w) for w in self.weights])
        for weight, part in zip(self.weights, parts):
            weight.copy_(part)

    def contiguous(self):
        return torch.cat(self.weights)[self.order]


def hf_views(model):
    """{Hugging Face's name: our weight, seen in its shape there}: copying into a view loads, reading it saves."""
    views, c = {}, model.config
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES:
            name = re.sub(ours, theirs, name)
        views[name] = p.data
    # There RoPE turns neighbours, latent and rotated key are one matrix, and keys and values alternate by head.
    pairs = torch.arange(c.rope_dim).view(2, -1).t().flatten()  # 0, D/2, 1, D/2 + 1...
    q, k, v = (torch.arange(c.n_head * n).view(c.n_head, n) for n in (c.nope_dim + c.rope_dim, c.nope_dim, c.v_dim))
    q = torch.cat((q[:, : c.nope_dim], q[:, c.nope_dim + pairs]), dim=1)
    joined = {
        "q_b_proj" if c.q_rank else "q_proj": (q, "wq"),
        "kv_a_proj_with_mqa": (torch.cat((torch.arange(c.kv_rank), c.kv_rank + pairs)), "wkv_down", "wk_rope"),
        "kv_b_proj": (torch.cat((k, k.numel() + v), dim=1), "wk", "wv"),
    }
    for layer in range(c.n_layer):
        at = f"model.layers.{layer}.self_attn."
        for theirs, (order, *ours) in joined.items():
            parts = [views.pop(f"{at}{name}.weight") for name in ours]
            views[f"{at}{theirs}.weight"] = Reordered(order.flatten(), *parts)
    return views


def config_from_hf(hf):
    hf = hf | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})  # as transformers 4 and 5 write them
    scaling = hf.get("rope_type", hf.get("type", "default"))
    if scaling == "yarn":
        hf = dict(mscale=None, mscale_all_dim=None) | hf  # without them YaRN sharpens the rotated part alone
    for key, value in (HF_FIXED | HF_YARN).items():
        if hf.get(key, value) != value:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")
    if hf["first_k_dense_replace"] < hf["num_hidden_layers"]:
        dense = f"first_k_dense_replace={hf['first_k_dense_replace']} of {hf['num_hidden_layers']} layers are dense"
        raise ValueError(f"config.json: {dense}, the others mixtures of experts: this file has dense layers only")
    fields = {ours: hf[theirs] for ours, theirs in HF_FIELDS.items()}
    fields["q_rank"] = fields["q_rank"] or 0
    if scaling != "default":
        fields |= dict(rope_scaling=scaling, rope_factor=hf["factor"])
        fields |= dict(rope_original=hf.get("original_max_position_embeddings", 0))
    return GPTConfig(**fields)


def config_to_hf(config):
    for key, value in dict(scale_embeddings=False, logit_softcap=0.0).items():
        if getattr(config, key) != value:
            raise ValueError(f"DeepSeek-V3 has no {key}={getattr(config, key)}: this model cannot be saved as one")
    hf = HF_FIXED | {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    hf |= dict(q_lora_rank=config.q_rank or None, num_key_value_heads=config.n_head)
    hf |= dict(first_k_dense_replace=config.n_layer, num_nextn_predict_layers=0)
    if config.rope_scaling != "none":
        original = {"original_max_position_embeddings": config.rope_original} if config.rope_original else {}
        hf["rope_scaling"] = dict(rope_type=config.rope_scaling, factor=config.rope_factor) | original
        if config.rope_scaling == "yarn":
            hf["rope_scaling"] |= dict(mscale=1.0, mscale_all_dim=1.0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), config.eot_id if config.eot_id >= 0 else None)
    return hf | ids | dict(architectures=["DeepseekV3ForCausalLM"])


HF_PREFIX, HF_IGNORED = "model.", ("lm_head.weight", "inv_freq")  # may be absent; copies of what is here already
HF_NAMES = [("^embed", "model.embed_tokens"), ("^blocks", "model.layers"), ("^norm", "model.norm"),
            ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"), (r"\.attn\.", ".self_attn."),
            (r"\.wo\.", ".o_proj."), (r"\.w_(gate|up|down)\.", r".\1_proj."), ("wq_down", "q_a_proj"),
            (r"\.(q|kv)_norm", r".\1_a_layernorm")]  # fmt: skip
HF_FIELDS = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", kv_rank="kv_lora_rank",
                 q_rank="q_lora_rank", nope_dim="qk_nope_head_dim", rope_dim="qk_rope_head_dim", v_dim="v_head_dim",
                 n_embd="hidden_size", n_inner="intermediate_size", block_size="max_position_embeddings",
                 vocab_size="vocab_size", norm_eps="rms_norm_eps", rope_theta="rope_theta",
                 tie_embeddings="tie_word_embeddings")  # fmt: skip
HF_FIXED = dict(model_type="deepseek_v3", hidden_act="silu", attention_bias=False, rope_interleave=True)
HF_YARN = dict(beta_fast=32, beta_slow=1, truncate=True, attention_factor=None, mscale=1.0, mscale_all_dim=1.0)

if __name__ == "__main__":  # overfit one batch for 20 steps, then continue its first tokens
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_embd=64, n_inner=160)
    sizes |= dict(kv_rank=32, q_rank=48, nope_dim=16, rope_dim=8, v_dim=16)
    model, batch, losses = GPT(GPTConfig(**sizes)), torch.randint(256, (4, 33)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        losses.append(model(batch[:, :-1], batch[:, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    size, cache_bytes = sum(p.numel() for p in model.parameters()), model.new_cache(1, 8).bytes_per_token()
    print(f"{size:,} parameters, {cache_bytes} cache bytes per token, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"greedy {model.generate(batch[:1, :8], 8, temperature=0)[0]} of {batch[0, 8:16].tolist()}")
