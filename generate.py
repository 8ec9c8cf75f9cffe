"""Text from any model file: prompts of any lengths, sampling, stop tokens, several samples of each, a compiled step.

    for tokens in stream(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0.8, top_p=0.95, stop=[0]):
        print(tokens.tolist())  # the next token of each prompt, -1 where it has ended
    rows = generate(model, [[1, 2, 3], [4]], max_new_tokens=50, temperature=0)
    rows = generate(model, [[1, 2, 3], [4]], max_new_tokens=50, step=CompiledStep(model))

and what reinforcement learning asks of a sampler: draws that can be repeated, and how likely each token was.

    uniforms = draws(seed=1, step=0, prompt_indices=[5, 8], num_samples=4, n=50)
    rows = rollout(model, [[1, 2, 3], [4]], 50, num_samples=4, uniforms=uniforms, stop=[0])
    rows.tokens[3], rows.logprobs[3]  # the last of the first prompt's four

It asks of a model that it has config.block_size and new_cache(batch_size, max_len, pad, static), and is called as
model(idx, cache=cache, last_only=True); and of a cache that it has branch(n).

B  rows: prompts * num_samples, the samples of a prompt side by side
T  time: the tokens of the longest prompt, and those generated so far
V  vocabulary
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch


class Rows:
    """The rows of a batch while they grow: next_logits(), then append(token), and so on.

    Samples of a prompt share its prefill and nothing after it. The options are those of stream.
    """

    def __init__(self, model, prompts, max_new_tokens, num_samples=1, crop=False, use_cache=True, step=None):
        self.model = model
        self.use_cache = use_cache
        self.step = step
        self.block_size = model.config.block_size
        self.cache = None

        # 1. the prompts side by side, each once for every sample
        idx, pad = pad_left(prompts, next(model.parameters()).device)
        self.idx = idx.repeat_interleave(num_samples, dim=0)  # (B, T)
        self.pad = pad.repeat_interleave(num_samples, dim=0)  # (B,)
        self.ragged = bool(pad.any())
        self.copies = num_samples  # rows that are still alike

        # 2. room for what comes
        T = idx.size(1)
        if T + max_new_tokens - 1 > self.block_size and not crop:  # the last token is never fed back
            too_long = f"{T} + {max_new_tokens} tokens do not fit block_size={self.block_size}"
            raise ValueError(f"{too_long}: try fewer, or stream's crop=True")
        self.max_len = min(T + max_new_tokens, self.block_size)
        if step is not None:  # powers of 2, so that few sizes are compiled
            self.max_len = min(2 ** math.ceil(math.log2(self.max_len)), self.block_size)

    def next_logits(self):
        """Returns the logits (B, V) of the next token: by the newest one behind a cache of the others, or by all."""
        is_full = self.idx.size(1) > self.block_size  # all tokens stand at other places once the first is lost
        if self.cache is None or is_full or not self.use_cache:
            return self.prefill()
        if self.step is None:
            return self.model(self.newest, cache=self.cache, last_only=True)[:, -1]
        return self.step(self.newest, self.cache)[:, -1]

    def prefill(self):
        """Returns the logits (B, V) by all the tokens for which block_size has room, and begins a cache with them."""
        n = self.copies
        lost = max(self.idx.size(1) - self.block_size, 0)
        idx = self.idx[::n, lost:]  # one of the rows that are alike
        pad = (self.pad[::n] - lost).clamp(min=0) if self.ragged else None
        self.cache = self.model.new_cache(len(idx), self.max_len, pad, static=self.step is not None)
        logits = self.model(idx, cache=self.cache, last_only=True)[:, -1]
        if n > 1:
            self.cache = self.cache.branch(n)
            logits = logits.repeat_interleave(n, dim=0)
            self.copies = 1
        if self.step is not None and lost == 0:
            self.cache = self.step.take_over(self.cache)
        return logits

    def append(self, token):
        """Takes the next token (B,) of every row."""
        self.newest = token[:, None]  # (B, 1); a slice of idx would have other strides each time, and be compiled anew
        self.idx = torch.cat((self.idx, self.newest), dim=1)


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
    think_budget: "ThinkBudget | None" = None,
) -> Iterator[torch.Tensor]:
    """Yields the next token of every row (B,) as they come, -1 in rows that have met a stop token.

    prompts: ids (B, T), or B lists of any lengths. num_samples: how many rows continue each prompt, side by side, from
    one prefill. temperature=0 is greedy; top_k=0, top_p=1 and repetition_penalty=1 are off.
    crop: when block_size is full, predict each further token from the last block_size ones; without it that is an
    error. use_cache=False computes all tokens again for each new one, to check the cache. step: see CompiledStep.
    think_budget: see ThinkBudget.
    """
    rows = Rows(model, prompts, max_new_tokens, num_samples, crop, use_cache, step)
    stop_ids = torch.tensor(list(stop), dtype=torch.long, device=rows.idx.device)
    ended = torch.zeros(len(rows.idx), dtype=torch.bool, device=rows.idx.device)
    thinking = Thinking(think_budget, rows.idx) if think_budget else None
    for _ in range(max_new_tokens):
        logits = rows.next_logits()
        token = pick_token(logits, rows.idx, temperature, top_k, top_p, repetition_penalty, generator)  # (B,)
        if thinking:
            token, _ = thinking.limit(token)
        ended |= torch.isin(token, stop_ids)
        if ended.all():
            return
        yield torch.where(ended, -1, token)
        rows.append(token)


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
    if repetition_penalty != 1.0:  # what was said becomes less likely (https://arxiv.org/abs/1909.05858)
        said = logits.gather(1, idx)  # (B, T)
        said = torch.where(said > 0, said / repetition_penalty, said * repetition_penalty)
        logits = logits.scatter(1, idx, said)
    if is_greedy(temperature):
        return logits.argmax(dim=-1)
    probs = log_probabilities(logits, temperature, top_k, top_p).exp()  # (B, V)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def is_greedy(temperature):
    """Whether a temperature is 0, or so little that logits divided by it are not finite."""
    return temperature < 1e-6


def log_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Returns the logarithms (B, V) in fp32 of the distribution that a token is drawn from; -inf: never drawn."""
    logp = (logits.float() / temperature).log_softmax(dim=-1)
    if top_k == 0 and top_p >= 1:
        return logp

    # 1. the likeliest first, and whose they are
    probs, ids = logp.exp().sort(dim=-1, descending=True, stable=True)

    # 2. keep the k likeliest; and of what is left the fewest that reach top_p of it together
    if top_k > 0:
        probs[:, top_k:] = 0.0
    if top_p < 1:
        likelier = probs.cumsum(dim=-1) - probs  # the probability of those before each
        probs = probs.masked_fill(likelier >= top_p * probs.sum(dim=-1, keepdim=True), 0.0)

    # 3. what is kept adds up to 1, each at its own place again
    probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(1, ids, probs).log()


# ---- texts that end what is written ----------------------------------------------------------------------------------


def first_stop(text: str, stops: Iterable[str], begin: int = 0) -> int | None:
    """Returns where the stop that is complete first begins in a text behind `begin` characters; None without one.

    Of stops that end together the longest counts. So it depends on the text alone and not on how that comes in pieces,
    or on how far it goes on: of the stops abc and b in ab, abc and abcd it is b, at 1.
    """
    found = []
    for stop in stops:
        place = text.find(stop, begin)
        if place >= 0:
            found.append((place + len(stop), place))
    if not found:
        return None
    _, place = min(found)
    return place


def until_stop(pieces: Iterable[str], stops: Sequence[str], begin: int = 0) -> Iterator[str]:
    """Yields the text of the pieces as it comes, up to the first stop behind `begin` characters, and no part of it."""
    longest = max((len(stop) for stop in stops), default=1)
    text = ""
    shown = 0
    for piece in pieces:
        text += piece
        place = first_stop(text, stops, max(begin, shown))
        if place is not None:
            yield text[shown:place]
            return
        # The last longest - 1 characters may be the beginning of a stop: they wait for the next piece.
        end = min(max(len(text) - longest + 1, begin), len(text))
        yield text[shown:end]
        shown = end
    yield text[shown:]


# ---- for reinforcement learning --------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """New tokens and what is known of them: a list of every row, which has an entry for each of its tokens."""

    tokens: list[list[int]]  # with the stop token that ended the row
    logprobs: list[list[float]]  # of each token under the distribution that it was drawn from; 0 where it was forced
    entropies: list[list[float]]  # of that distribution, in nats; 0 where the token was forced
    forced: list[list[bool]]  # whether the thinking budget set the token: no choice of the model's, nothing to learn
    cut: list[bool]  # of a row: whether it met max_new_tokens and no stop token


@torch.no_grad()
def rollout(
    model: torch.nn.Module,
    prompts: torch.Tensor | list,
    max_new_tokens: int,
    num_samples: int = 1,
    uniforms: torch.Tensor | None = None,
    stop: Iterable[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    think_budget: "ThinkBudget | None" = None,
    use_cache: bool = True,
    step: "CompiledStep | None" = None,
) -> Rollout:
    """Returns continuations of every prompt, up to and with a stop token, and how likely each of their tokens was.

    uniforms: numbers from 0 up to but not 1, (B, max_new_tokens), as draws() makes them. Token i of a row is chosen by
    number i of it, so that nothing else in the batch changes what is drawn. Other options are those of stream.
    Greedily (temperature=0) no number is needed, and probabilities are those of temperature 1.
    A model with dropout is to be in eval mode.
    """
    rows = Rows(model, prompts, max_new_tokens, num_samples, use_cache=use_cache, step=step)
    B = len(rows.idx)
    device = rows.idx.device
    greedy = is_greedy(temperature)
    if not greedy:
        uniforms = checked_uniforms(uniforms, B, max_new_tokens, device)
    stop_ids = torch.tensor(list(stop), dtype=torch.long, device=device)
    thinking = Thinking(think_budget, rows.idx) if think_budget else None

    tokens = torch.full((B, max_new_tokens), -1, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    entropies = torch.zeros(B, max_new_tokens, device=device)
    forced = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for i in range(max_new_tokens):
        # 1. draw
        logits = rows.next_logits()
        if greedy:
            logp = log_probabilities(logits)  # (B, V)
            probs = logp.exp()
            token = logp.argmax(dim=-1)
        else:
            logp = log_probabilities(logits, temperature, top_k, top_p)
            probs = logp.exp()
            token = draw(probs, uniforms[:, i])

        # 2. keep what is known of it
        logprobs[:, i] = logp.gather(1, token[:, None])[:, 0]
        entropies[:, i] = torch.special.entr(probs).sum(dim=-1)
        if thinking:
            token, forced[:, i] = thinking.limit(token)
        tokens[:, i] = torch.where(ended, -1, token)

        # 3. go on while any row does; those that have ended are computed on, since a cache gives up no row
        ended |= torch.isin(token, stop_ids)
        if ended.all():
            break
        rows.append(token)

    # 4. one list a row, as long as the row
    logprobs.masked_fill_(forced, 0.0)
    entropies.masked_fill_(forced, 0.0)
    lengths = (tokens >= 0).sum(dim=1).tolist()

    def lists(x):
        return [row[:length] for row, length in zip(x.tolist(), lengths)]

    return Rollout(lists(tokens), lists(logprobs), lists(entropies), lists(forced), (~ended).tolist())


def draws(seed: int, step: int, prompt_indices: Sequence[int], num_samples: int, n: int) -> torch.Tensor:
    """Returns uniform numbers (len(prompt_indices) * num_samples, n) in fp64, for rollout.

    A row of them is a function of (seed, step, prompt's index, sample's number) alone. It is the same on whichever
    process a prompt is drawn, and after a run has been resumed. Philox (https://doi.org/10.1145/2063384.2063405)
    encrypts a counter: rows begin at counters that lie so far apart that they never meet.
    """
    rows = []
    for prompt in prompt_indices:
        for sample in range(num_samples):
            philox = np.random.Philox(key=(seed, step), counter=(0, 0, prompt, sample))
            rows.append(np.random.Generator(philox).random(n))
    return torch.from_numpy(np.stack(rows))


def checked_uniforms(uniforms, B, n, device):
    """Returns the numbers as a tensor of B rows on a device; ValueError where they are not what rollout needs."""
    if uniforms is None:
        raise ValueError("rollout draws by the uniforms that it is given: make them with draws(...)")
    uniforms = torch.as_tensor(uniforms)
    if uniforms.size(0) != B or uniforms.size(1) < n:
        shape = tuple(uniforms.shape)
        raise ValueError(f"uniforms of shape {shape} are not enough for {B} rows of {n} tokens")
    if uniforms.min() < 0 or uniforms.max() >= 1:
        raise ValueError("uniforms are to be from 0 up to, and not including, 1")
    dtype = dtype_of_sums(device)
    below_one = 1 - torch.finfo(dtype).eps  # rounded to fp32, a number may be 1, which lies behind every token's part
    return uniforms.to(dtype).clamp(max=below_one).to(device)


def dtype_of_sums(device):
    """Returns the dtype in which probabilities are added up: in fp32 the tail of a large vocabulary is rounded away."""
    if device.type == "mps":  # which has no fp64
        return torch.float32
    return torch.float64


def draw(probs, uniform):
    """Returns the tokens (B,) that numbers (B,) between 0 and 1 choose of distributions (B, V).

    The tokens share the range from 0 to 1. Of probabilities 0.2 0.5 0.3 the sums are 0.2 0.7 1.0,
    and 0.65 chooses the second token, whose part begins at 0.2 and ends at 0.7.
    """
    sums = probs.to(uniform.dtype).cumsum(dim=-1)  # (B, V)
    place = uniform[:, None] * sums[:, -1:]  # (B, 1), of the sum that came out, nearly 1
    return torch.searchsorted(sums, place, right=True)[:, 0]


# ---- a budget of thinking --------------------------------------------------------------------------------------------


class ThinkBudget(NamedTuple):
    """How many tokens a model may think, and the tokens that end its thinking then."""

    n: int  # tokens behind <think>, those that stand in the prompt counted too
    think_id: int  # <think>
    think_end_id: int  # </think>
    end_ids: Sequence[int]  # what is forced: the tokens of "\n</think>\n\n"


class Thinking:
    """How far each row of a batch has come with its thinking.

    so_far (B,) counts the tokens behind <think>, and is -1 where nobody thinks. From n on tokens are forced, until all
    of end_ids stand there. With n=2 and the end_ids x y:
        token   <think> a b x y c
        so_far  0       1 2 3 -1 -1
    """

    def __init__(self, budget, idx):
        self.budget = budget
        self.end_ids = torch.tensor(list(budget.end_ids), device=idx.device)
        place = torch.arange(idx.size(1), device=idx.device)
        begin = torch.where(idx == budget.think_id, place, -1).amax(dim=1)  # (B,), the last <think> of each prompt
        end = torch.where(idx == budget.think_end_id, place, -1).amax(dim=1)
        so_far = (idx.size(1) - 1 - begin).clamp(max=budget.n)  # a prompt that thinks too long is ended at once
        self.so_far = torch.where(begin > end, so_far, -1)

    def limit(self, token):
        """Takes the next token (B,) of each row; returns what stands there instead, and whether it is forced (B,)."""
        n = self.budget.n
        last = len(self.end_ids) - 1
        is_forced = self.so_far >= n
        token = torch.where(is_forced, self.end_ids[(self.so_far - n).clamp(0, last)], token)

        thinks = self.so_far >= 0
        so_far = torch.where(thinks, self.so_far + 1, -1)
        ends = torch.where(is_forced, so_far > n + last, token == self.budget.think_end_id)
        so_far = torch.where(ends, -1, so_far)
        begins = ~thinks & (token == self.budget.think_id)
        self.so_far = torch.where(begins, 0, so_far)
        return token, is_forced


# ---- the compiled step -----------------------------------------------------------------------------------------------


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
