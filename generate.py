"""Text from any model file: prompts of any lengths, sampling, stop tokens, several samples of each, a compiled step.

    for tokens in stream(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0.8, top_p=0.95, stop=[0]):
        print(tokens.tolist())  # the next token of each prompt, -1 where it has ended
    rows = generate(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0)
    rows = generate(model, [[1, 2, 3], [4]], max_new_tokens=50, step=CompiledStep(model))

It asks of a model that it has config.block_size and new_cache(batch_size, max_len, pad, static), and is called as
model(idx, cache=cache, last_only=True); and of a cache that it has branch(n).

B  rows: prompts, and behind the prefill prompts * num_samples
T  time: the tokens of the longest prompt, and those generated so far
V  vocabulary
"""

import copy
import math
from collections.abc import Iterable, Iterator

import torch


@torch.no_grad()
def stream(
    model: torch.nn.Module,
    prompts: torch.Tensor | list,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: Iterable[int] = (),
    num_samples: int = 1,
    crop: bool = False,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    step: "CompiledStep | None" = None,
) -> Iterator[torch.Tensor]:
    """Yields the next token of every row (B,) as they come, -1 in rows that have met a stop token.

    prompts: ids (B, T), or B lists of any lengths. num_samples: how many rows continue each prompt, side by side, from
    one prefill. temperature=0 is greedy; top_k=0, top_p=1 and repetition_penalty=1 are off.
    crop: when block_size is full, predict each further token from the last block_size ones; without it that is an
    error. use_cache=False computes all tokens again for each new one, to check the cache. step: see CompiledStep.
    """
    # 1. the prompts side by side, and which rows have ended
    device = next(model.parameters()).device
    idx, pad = pad_left(prompts, device)
    ragged = bool(pad.any())
    stop_ids = torch.tensor(list(stop), dtype=torch.long, device=device)
    ended = torch.zeros(len(idx) * num_samples, dtype=torch.bool, device=device)

    # 2. room for them
    block_size = model.config.block_size
    T = idx.size(1)
    if T + max_new_tokens - 1 > block_size and not crop:  # the last token is never fed back
        raise ValueError(f"{T} + {max_new_tokens} tokens do not fit block_size={block_size}: try crop=True")
    max_len = min(T + max_new_tokens, block_size)
    if step is not None:  # powers of 2, so that few sizes are compiled
        max_len = min(2 ** math.ceil(math.log2(max_len)), block_size)

    for i in range(max_new_tokens):
        # 3. predict: by the newest token behind a cache of the others, or by all for which block_size has room
        lost = max(idx.size(1) - block_size, 0)
        is_prefill = i == 0 or lost > 0 or not use_cache
        if is_prefill:
            new = idx[:, lost:]
            new_pad = (pad - lost).clamp(min=0) if ragged else None
            cache = model.new_cache(len(idx), max_len, new_pad, static=step is not None)
        if is_prefill or step is None:
            logits = model(new, cache=cache, last_only=True)[:, -1]  # (B, V)
        else:
            logits = step(new, cache)[:, -1]

        # 4. branch: the samples of a prompt share its prefill, and nothing after it
        if i == 0 and num_samples > 1:
            cache = cache.branch(num_samples)
            logits = logits.repeat_interleave(num_samples, dim=0)
            idx = idx.repeat_interleave(num_samples, dim=0)
            pad = pad.repeat_interleave(num_samples, dim=0)
        if i == 0 and step is not None:
            cache = step.take_over(cache)

        # 5. pick the next token
        token = pick_token(logits, idx, temperature, top_k, top_p, repetition_penalty, generator)  # (B,)
        ended |= torch.isin(token, stop_ids)
        if ended.all():
            return
        yield torch.where(ended, -1, token)
        new = token[:, None]  # (B, 1)
        idx = torch.cat((idx, new), dim=1)


def generate(
    model: torch.nn.Module, prompts: torch.Tensor | list, max_new_tokens: int, num_samples: int = 1, **options
) -> list[list[int]]:
    """Returns the new tokens of every row as a list, without the stop token that ended it; options as in stream."""
    rows = [[] for _ in range(len(prompts) * num_samples)]
    for tokens in stream(model, prompts, max_new_tokens, num_samples=num_samples, **options):
        for row, token in zip(rows, tokens.tolist()):
            if token >= 0:
                row.append(token)
    return rows


def pad_left(prompts, device):
    """Returns ids (B, T) that end with the prompts, and the number of padding tokens before each (B,).

    A prompt is padded with its own first token, which a repetition penalty counts anyway:
        [7, 8, 9], [5]  ->  ids 7 8 9, 5 5 5  and padding 0, 2
    """
    if torch.is_tensor(prompts):
        prompts = prompts.tolist()
    if not prompts or not all(prompts):
        raise ValueError("an empty prompt: begin with a token, for example the one that begins a document")
    longest = max(len(prompt) for prompt in prompts)
    rows = []
    pad = []
    for prompt in prompts:
        missing = longest - len(prompt)
        rows.append([prompt[0]] * missing + list(prompt))
        pad.append(missing)
    return torch.tensor(rows, device=device), torch.tensor(pad, device=device)


def pick_token(logits, idx, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, generator=None):
    """Returns the next token (B,), drawn by logits (B, V) behind the tokens so far idx (B, T)."""
    logits = logits.float()

    # 1. what was said becomes less likely (https://arxiv.org/abs/1909.05858)
    if repetition_penalty != 1.0:
        said = logits.gather(1, idx)  # (B, T)
        said = torch.where(said > 0, said / repetition_penalty, said * repetition_penalty)
        logits = logits.scatter(1, idx, said)
    if temperature < 1e-6:  # 0, or so little that logits divided by it are not finite
        return logits.argmax(dim=-1)

    # 2. probabilities (B, V), the likeliest first, and whose they are
    probs = (logits / temperature).softmax(dim=-1)
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)

    # 3. keep the k likeliest; and of what is left the fewest that reach top_p of it together
    if top_k > 0:
        probs[:, top_k:] = 0.0
    if top_p < 1:
        likelier = probs.cumsum(dim=-1) - probs  # the probability of those before each
        probs = probs.masked_fill(likelier >= top_p * probs.sum(dim=-1, keepdim=True), 0.0)

    # 4. draw
    place = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
    return ids.gather(1, place)[:, 0]


class CompiledStep:
    """One more token through a compiled model, a CUDA graph on a GPU: stream(..., step=CompiledStep(model)).

    Its caches are static: shapes never depend on the length, and all texts with caches alike share one compiled graph.
    A CUDA graph also holds the addresses of its tensors. So there is one cache of each kind, which texts use in turn.
    """

    def __init__(self, model: torch.nn.Module):
        mode = "default"
        if next(model.parameters()).is_cuda:
            mode = "reduce-overhead"
        self.forward = torch.compile(model.forward, dynamic=False, mode=mode)
        self.caches = []  # one of each kind
        self.text = None  # the cache of the text that it continues

    def __call__(self, token, cache):
        """Returns the logits (B, 1, V) behind token (B, 1)."""
        if cache is not self.text:
            raise RuntimeError("a compiled step continues one text at a time: end it before the next, or make another")
        return self.forward(token, cache=cache, last_only=True)

    def take_over(self, cache):
        """Returns a cache with the contents of this one, at the addresses of its kind: that of the text to continue."""
        tensors, kind = tensors_and_kind(cache)
        ours = self.cache_of_kind(kind)
        if ours is None:
            ours = cache
            self.caches.append(ours)
            for x in tensors:
                torch._dynamo.mark_static_address(x)
        else:
            our_tensors, _ = tensors_and_kind(ours)
            for to, x in zip(our_tensors, tensors):
                to.copy_(x)
        self.text = copy.copy(ours)  # of the same tensors: an object that tells this text from others
        return self.text

    def cache_of_kind(self, kind):
        for cache in self.caches:
            _, its_kind = tensors_and_kind(cache)
            if its_kind == kind:
                return cache
        return None


def tensors_and_kind(cache):
    """Returns a cache's tensors, and what must be equal in two caches that share a compiled graph.

    It knows no field of a cache by its name: it walks all of them, and the lists among them.
    """
    tensors = []
    kind = [type(cache)]
    for name, value in vars(cache).items():
        for x in value if isinstance(value, list) else [value]:
            if torch.is_tensor(x):
                tensors.append(x)
                kind.append((name, x.shape, x.dtype, x.device))
            else:
                kind.append((name, x))
    return tensors, kind
