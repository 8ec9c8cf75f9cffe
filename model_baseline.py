"""A dense decoder in the style of Qwen3 (https://arxiv.org/abs/2505.09388): what every other file is diffed against.

    x = x + Wo softmax(rope(norm(Wq u)) rope(norm(Wk u))^T / sqrt(D)) Wv u       u = RMSNorm(x)
    x = x + Wdown (silu(Wgate u) * (Wup u))                                      u = RMSNorm(x)

B batch, T time, S time with the cached past, C n_embd, H query heads, G key/value heads, D head_dim, V vocabulary.
Differs from model_baseline.py in: nothing
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
    n_head: int = 12  # query heads
    n_kv_head: int = 4  # key/value heads: n_head is MHA, 1 is MQA, between is GQA
    head_dim: int = 64  # n_head * head_dim need not be n_embd
    n_embd: int = 768
    n_inner: int = 2048  # width of the MLP, about 8/3 n_embd
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


def hf_views(model):
    """{Hugging Face's name: our weight, seen in its shape there}: copying into a view loads, reading it saves."""
    views = {}
    for name, p in model.named_parameters():
        for ours, theirs in HF_NAMES:
            name = re.sub(ours, theirs, name)
        views[name] = p.data
    return views


def config_from_hf(hf):
    hf = hf | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})  # as transformers 4 and 5 write them
    for key, value in (HF_FIXED | HF_YARN).items():
        if hf.get(key, value) != value:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")
    fields = {ours: hf[theirs] for ours, theirs in HF_FIELDS.items()}
    scaling = hf.get("rope_type", hf.get("type", "default"))
    if scaling != "default":
        fields |= dict(rope_scaling=scaling, rope_factor=hf["factor"])
        fields |= dict(rope_original=hf.get("original_max_position_embeddings", 0))
    return GPTConfig(**fields)


def config_to_hf(config):
    for key, value in dict(qk_norm=True, scale_embeddings=False, logit_softcap=0.0).items():
        if getattr(config, key) != value:
            raise ValueError(f"Qwen3 has no {key}={getattr(config, key)}: this model cannot be saved as one")
    hf = HF_FIXED | {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    if config.rope_scaling != "none":
        original = {"original_max_position_embeddings": config.rope_original} if config.rope_original else {}
        hf["rope_scaling"] = dict(rope_type=config.rope_scaling, factor=config.rope_factor) | original
    return hf | dict(architectures=["Qwen3ForCausalLM"])


HF_PREFIX, HF_IGNORED = "model.", ("lm_head.weight", "inv_freq")  # may be absent; copies of what is here already
HF_NAMES = [("^embed", "model.embed_tokens"), ("^blocks", "model.layers"), ("^norm", "model.norm"),
            ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"), (r"\.attn\.", ".self_attn."),
            (r"\.w([qkvo])\.", r".\1_proj."), (r"\.w_(gate|up|down)\.", r".\1_proj.")]  # fmt: skip
HF_FIELDS = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                 n_embd="hidden_size", n_inner="intermediate_size", block_size="max_position_embeddings",
                 vocab_size="vocab_size", head_dim="head_dim", norm_eps="rms_norm_eps", rope_theta="rope_theta",
                 tie_embeddings="tie_word_embeddings")  # fmt: skip
HF_FIXED = dict(model_type="qwen3", hidden_act="silu", attention_bias=False, use_sliding_window=False)
HF_YARN = dict(beta_fast=32, beta_slow=1, truncate=True, attention_factor=None, mscale=None, mscale_all_dim=None)

if __name__ == "__main__":  # overfit one batch for 20 steps, then continue its first tokens
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, n_embd=64, n_inner=160)
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
