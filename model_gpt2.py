"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): where it all started.

    x = Wembed[idx] + Wpos[t]
    x = x + Wo softmax(q k^T / sqrt(D)) v        q, k, v = Wq u, Wk u, Wv u     u = LayerNorm(x)
    x = x + Wdown gelu(Wup u)                                                   u = LayerNorm(x)

B  batch
T  time: the tokens of one call
S  time with the cached past
C  n_embd, the width of the residual stream
H  heads
D  head_dim = C / H
V  vocabulary

The first lesson, from which the others differ.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int = 50304  # GPT-2's 50,257 tokens rounded up to a multiple of 64: faster matmuls
    block_size: int = 1024  # the longest sequence: each position has a learned vector
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = True  # in linear layers and LayerNorms: without it is a little faster and no worse
    norm_eps: float = 1e-5
    dropout: float = 0.0  # on the embeddings and the output of each branch: for many epochs over little data
    init_std: float = 0.02  # std of every weight matrix; wo and w_down use init_std / sqrt(2 n_layer)
    eot_id: int = -1  # the token that begins a document: no token sees an earlier document; -1: all is one document

    def __post_init__(self):
        if self.n_embd % self.n_head:
            lower = max(self.n_embd - self.n_embd % self.n_head, self.n_head)
            near = f"try {lower} or {lower + self.n_head}"
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: {near}")


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.layer = layer
        self.head_dim = C // config.n_head
        self.wq = nn.Linear(C, C, bias=config.bias)
        self.wk = nn.Linear(C, C, bias=config.bias)
        self.wv = nn.Linear(C, C, bias=config.bias)
        self.wo = nn.Linear(C, C, bias=config.bias)

    def forward(self, x, mask=None, cache=None):
        """Returns (B, T, C) for x (B, T, C); rope is (cos, sin), mask as GPT.positions_and_mask returns it."""
        B, T, _ = x.shape
        # 1. project; -1 counts the heads, of which a device has a share where tensor parallelism splits them
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        # 2. attend, heads before time
        q = q.transpose(1, 2)  # (B, H, T, D)
        k = k.transpose(1, 2)  # (B, H, T, D)
        v = v.transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        # 3. merge the heads
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

    def attend(self, q, k, v, mask):
        """Returns softmax attention (B, H, T, D) of q (B, H, T, D) to k, v (B, H, S, D)."""
        causal = False
        if mask is None and q.size(2) > 1:  # a single query sees all keys
            causal = True
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


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
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class KVCache:
    """Keys and values of the tokens so far, in buffers made once: k[layer] and v[layer] (B, H, max_len, D).

    A forward pass calls advance once, which takes places for its tokens; then each layer appends what belongs there.
    doc_start (B, max_len) holds for each place the place where its document begins; tokens see each other where it is
    equal. Padding at the left is a document of its own. Two rows, the second with pad=1; E is eot_id, - is padding:
        tokens       a b E c    - a b c
        doc_start    0 0 2 2    0 1 1 1
        position     0 1 0 1    0 0 1 2    place - doc_start
    """

    def __init__(self, config, batch_size, max_len, pad=None, static=False, device=None, dtype=None):
        shape = (batch_size, config.n_head, max_len, config.n_embd // config.n_head)
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
        """Writes k, v (B, H, T, D) at the places of the newest tokens; returns those of all so far, (B, H, S, D)."""
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
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_embed = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Sets every parameter; raises on one that it does not know, so that a new weight says how it begins."""
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.n_layer)  # 2 n_layer branches add up in the residual stream
        for name, p in self.named_parameters():
            kind = name.removesuffix(".weight").split(".")[-1]  # wq of blocks.0.attn.wq.weight
            if name.endswith("bias"):
                p.zero_()
            elif kind.endswith("norm"):
                p.fill_(1.0)
            elif kind in ("wo", "w_down"):
                p.normal_(0.0, residual_std)
            elif kind in ("embed", "pos_embed", "wq", "wk", "wv", "w_up"):
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
        x = self.dropout(self.embed(idx) + self.pos_embed(positions))  # (B, T, C)
        for block in self.blocks:
            x = block(x, mask, cache)
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
        return F.linear(x, self.embed.weight)  # tied: the head is the embedding transposed

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


TINY = dict(vocab_size=256, block_size=64, n_layer=2, n_head=4, n_embd=64)

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
