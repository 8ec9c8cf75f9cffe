"""What a model is asked between the steps of its run: its loss on validation texts, and how it continues one."""

import importlib
import json
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch

from data.shards import Shards
from data.tokenizers import Tokenizer
from distributed import processes
from training.loss import loss_report, loss_sums
from training.stored import is_sharded

PROMPT = 16  # tokens
CONTINUATION = 64  # tokens
TEMPERATURE = 0.8


def shares_weights(model: torch.nn.Module) -> bool:
    """Returns whether each process holds only a part of the model, so that a forward is everybody's.

    To be asked before a forward, which gathers the weights.
    """
    return any(is_sharded(p) for p in model.parameters())


def evaluate(
    model: torch.nn.Module,
    stage,
    bytes_of: dict[Shards, torch.Tensor],
    eval_tokens: int,
    rank: int,
    world_size: int,
    device: str,
    autocast: AbstractContextManager,
) -> dict[str, dict]:
    """Returns {name of a text: its loss_report}, without auxiliary losses; where there are many, that of all is first.

    They share eval_tokens, the same ones every time, by their weights. The run ends where no token is a target, or one
    is not of the vocabulary.
    """
    sharded = shares_weights(model)
    model.eval()
    sums = []
    try:
        for shards, batches in stage.evaluations(eval_tokens, rank, world_size, device):
            if sharded:
                batches = in_step(model, batches, stage.block_size, device)
            found = loss_sums(model, batches, bytes_of[shards], autocast)
            sums.append(torch.tensor(processes.all_sum(found, device), dtype=torch.float64))
        model.train()
        reports = {"": loss_report(sum(sums))}
        if len(sums) > 1:
            reports |= dict(zip(stage.val_names, map(loss_report, sums)))
        return reports
    except (OSError, ValueError) as error:
        processes.fail(error)


def in_step(model, batches: Iterable[tuple], block_size: int, device: str) -> Iterable[tuple]:
    fsdp = importlib.import_module("distributed.fsdp")  # takes its time to import
    return fsdp.in_step(model, batches, block_size, device)


class Sampler:
    """How a run's model continues the beginning of the validation text, the same beginning every time.

    Its random numbers are its own: those of the run go on as if there had been no sample.
    """

    def __init__(self, model, shards: Shards, tokenizer: Tokenizer | None, vocab_size: int, device: str, seed: int):
        if tokenizer is None:
            raise ValueError(f"sample_every needs text, and {shards.folder} has no tokenizer: try sample_every=0")
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.seed = seed
        length = min(PROMPT, len(shards))
        self.prompt = torch.from_numpy(shards.read(0, length).astype("int64"))[None].to(device)  # (1, T)
        self.means_nothing = torch.ones(vocab_size, dtype=torch.bool)  # padding, which no text stands behind
        for i, size in enumerate(tokenizer.token_bytes()):
            self.means_nothing[i] = not size
        self.means_nothing[list(tokenizer.special_tokens.values())] = False
        self.means_nothing = self.means_nothing.to(device)

    @torch.no_grad()
    def text(self, autocast: AbstractContextManager) -> str:
        """Returns the prompt and how the model continues it, on one line.

        Each token takes a forward of all before it. A cache would be faster, and this works with weights in shares.
        """
        sharded = shares_weights(self.model)
        self.model.eval()
        generator = torch.Generator(self.device).manual_seed(self.seed)
        ids = self.prompt
        for _ in range(CONTINUATION):
            window = ids[:, -self.model.config.block_size :]
            with autocast:
                logits = self.model(window, last_only=True)[:, -1]  # (1, V)
            logits = logits.float().masked_fill(self.means_nothing, -torch.inf)
            token = torch.multinomial((logits / TEMPERATURE).softmax(dim=-1), 1, generator=generator)
            ids = torch.cat((ids, token), dim=1)
        if sharded:
            list(in_step(self.model, [], 1, self.device))  # no backward gives back what was gathered
        self.model.train()
        return json.dumps(self.tokenizer.decode(ids[0].tolist()), ensure_ascii=False)
