"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): where it all started.

    x = Wembed[idx] + Wpos[t]
    x = x + Wo softmax(q k^T / sqrt(D)) v        q, k, v = split(Wqkv u)    u = LayerNorm(x)
    x = x + Wdown gelu(Wup u)                                               u = LayerNorm(x)

B batch, T time, S time with the cached past, C n_embd, H heads, D head_dim = C / H, V vocabulary.
Differs from model_baseline.py in: GPTConfig, RMSNorm, rope_cos_sin, apply_rope, KVCache, Attention, MLP, Block,
GPT.__init__, GPT.init_weights, GPT.forward, GPT.logits, hf_views, config_from_hf, config_to_hf
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # 50,257 of GPT-2 rounded up to a multiple of 64: faster matmuls
    block_size: int = 1024  # the longest sequence: a position has a learned vector
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True  # in linear layers and LayerNorms; without it is a little faster and no worse
    norm_eps: float = 1e-5
    dropout: float = 0.0  # on the embeddings and the output of each branch: for many epochs over little data
    init_std: float = 0.02  # of every matrix; those that write to the residual stream get 1 / sqrt(2 n_layer) of it
    eot_id: int = -1  # the token that begins a document: nothing crosses it; -1: one document, the fast causal path

    def __post_init__(self):
        if self.n_embd % self.n_head:
            lower = self.n_embd - self.n_embd % self.n_head
            near = f"try {lower} or {lower + self.n_head}" if lower else f"try {self.n_head}"
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: {near}")


class KVCache:
    """Keys and values so far, preallocated: a layer's k, v (B, H, max_len, D). pad (B,) counts padding at the left."""

    def __init__(self, config, batch_size, max_len, pad=None, device=None, dtype=None):
        shape, layers = (batch_size, config.n_head, max_len, config.n_embd // config.n_head), range(config.n_layer)
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in layers] for _ in range(2))
        self.length, self.padded = 0, pad is not None
        pad = torch.zeros(batch_size, dtype=torch.long, device=device) if pad is None else pad
        self.start = torch.where(torch.arange(max_len, device=device) < pad[:, None], 0, pad[:, None])  # of documents

    def check(self, B, T):
        if B != self.start.size(0) or self.length + T > self.start.size(1):
            raise ValueError(f"{B} x ({self.length} + {T}) tokens do not fit a cache of {tuple(self.start.shape)}")

    def append(self, layer, k, v):
        """Writes k, v (B, H, T, D) behind a layer's past and returns past and present, (B, H, S, D)."""
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
        self.layer, self.head_dim = layer, config.n_embd // config.n_head
        self.wqkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.wo = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask=None, cache=None):
        B, T, _ = x.shape
        q, k, v = self.wqkv(x).view(B, T, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        causal = True if mask is None and T > 1 else False  # torch.compile wants a bool; one query sees all the past
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w_up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.w_down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.w_down(F.gelu(self.w_up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), mask, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_embed = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        residual_scale = (2 * self.config.n_layer) ** -0.5
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("norm.weight"):
                p.fill_(1.0)
            else:
                scale = residual_scale if name.endswith(("wo.weight", "w_down.weight")) else 1.0
                p.normal_(0.0, self.config.init_std * scale)

    def forward(self, idx, targets=None, cache=None, last_only=False):
        """idx (B, T) -> logits (B, T, V); with targets (B, T) -> the mean loss, a scalar; targets of -1 are ignored.

        A cache holds the tokens before idx, and idx is appended to it. last_only: logits (B, 1, V) of the last token.
        """
        positions, mask = self.positions_and_mask(idx, cache)
        x = self.dropout(self.embed(idx) + self.pos_embed(positions))  # (B, T, C)
        for block in self.blocks:
            x = block(x, mask, cache)
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
        return F.linear(x, self.embed.weight)  # the head is the embedding transposed: (B, T, V)

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
        stored_in_out = re.search(r"\.w\w+\.weight", name)  # Conv1D there: (in, out)
        for ours, theirs in HF_NAMES:
            name = re.sub(ours, theirs, name)
        views[name] = p.data.t() if stored_in_out else p.data
    return views


def config_from_hf(hf):
    for key, value in HF_FIXED.items():
        if hf.get(key, value) != value:
            raise ValueError(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}")
    return GPTConfig(**{ours: hf[theirs] for ours, theirs in HF_FIELDS.items()})


def config_to_hf(config):
    if not config.bias:
        raise ValueError("GPT-2 in transformers has no bias=False: this model cannot be saved as one")
    hf = HF_FIXED | {theirs: getattr(config, ours) for ours, theirs in HF_FIELDS.items()}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), config.eot_id if config.eot_id >= 0 else None)
    return hf | ids | dict(architectures=["GPT2LMHeadModel"])


HF_PREFIX, HF_IGNORED = "transformer.", ("lm_head.weight", ".attn.bias", ".attn.masked_bias")  # a copy; causal masks
HF_NAMES = [("^embed", "transformer.wte"), ("^pos_embed", "transformer.wpe"), ("^norm", "transformer.ln_f"),
            ("^blocks", "transformer.h"), ("attn_norm", "ln_1"), ("mlp_norm", "ln_2"), ("wqkv", "c_attn"),
            ("wo|w_down", "c_proj"), ("w_up", "c_fc")]  # fmt: skip
HF_FIELDS = dict(n_layer="n_layer", n_head="n_head", n_embd="n_embd", block_size="n_positions",
                 vocab_size="vocab_size", norm_eps="layer_norm_epsilon")  # fmt: skip
HF_FIXED = dict(model_type="gpt2", activation_function="gelu_new", n_inner=None, scale_attn_weights=True,
                scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)  # fmt: skip

if __name__ == "__main__":  # overfit one batch for 20 steps, then continue its first tokens
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_embd=64)
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
