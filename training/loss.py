"""The loss of a model over a split: nats a token, perplexity, and bits per byte of the text behind the tokens."""

import math
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F


def bytes_of_tokens(tokenizer, vocab_size: int, shards=None) -> torch.Tensor:
    """Returns fp64 (vocab_size,): the bytes of text that each token stands for; 0 for special ones.

    A tokenizer may lose text: sentencepiece joins spaces and writes <unk> for what it does not know, NFC composes
    letters. Bits per byte are of the text, whoever wrote it into tokens, so with shards that know how many bytes of
    text their split was made of, every token stands for its share of these.
    """
    sizes = torch.zeros(vocab_size, dtype=torch.float64)
    if tokenizer:
        sizes[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes())
    if shards and "text_bytes" in shards.meta:
        sizes *= shards.meta["text_bytes"][shards.split] / max(shards.meta["bytes"][shards.split], 1)
    return sizes


def text_tokens(model, x: torch.Tensor) -> int:
    """Returns how many tokens of x the model's auxiliary losses are means over: all but padding, where it has a say."""
    if not hasattr(model, "padding"):
        return x.numel()
    return x.numel() - model.padding(x).sum().item()


@torch.no_grad()
def loss_sums(model, batches: Iterable[tuple], bytes_of: torch.Tensor, autocast=None) -> torch.Tensor:
    """Returns fp64 (4,): nats and number of all targets that are not -1; nats and bytes of those that stand for text.

    model(x) gives logits, so there is no auxiliary loss in it. The caller sets eval mode.
    """
    total = torch.zeros(4, dtype=torch.float64)
    for x, y in batches:
        with autocast or nullcontext():
            logits = model(x)
        targets = y.flatten()
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-1, reduction="none")
        nats = nats.cpu().double()
        targets = targets.cpu()
        valid = targets >= 0
        size = bytes_of[targets.clamp(min=0)] * valid
        total += torch.stack((nats.sum(), valid.sum(), nats[size > 0].sum(), size.sum())).double()
    return total


def loss_report(sums: Iterable[float]) -> dict:
    """Returns loss (nats a token), perplexity = exp(loss), bits_per_byte = nats / (ln 2 * bytes), tokens and bytes.

    Bits per byte leave out the tokens that no text stands behind, such as the one that begins a document; they are None
    where no token has text. ValueError where there are no targets.
    """
    nats, tokens, text_nats, size = map(float, sums)
    if tokens == 0:
        raise ValueError("no token of the validation split is a target: raise eval_tokens, or prepare more text")
    loss = nats / tokens
    perplexity = math.inf
    if loss < 700:  # the largest float is exp(709.8)
        perplexity = math.exp(loss)
    bits_per_byte = None
    if size > 0:
        bits_per_byte = text_nats / math.log(2) / size
    sizes = dict(tokens=int(tokens), bytes=round(size))
    return dict(loss=loss, perplexity=perplexity, bits_per_byte=bits_per_byte, **sizes)
