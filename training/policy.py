"""A trained model that is to be trained further on what it writes itself, or on pairs of texts."""

import copy
import hashlib
import importlib
from dataclasses import fields
from pathlib import Path

import torch

from data.tokenizers import Tokenizer
from training import checkpoint, load, start
from training.machine import Machine

# What makes a token's probability depend on more than the tokens before it: on chance, or on what else is in the batch.
OFF = {"dropout": 0.0, "router_jitter": 0.0, "capacity_factor": 0.0}


def build(config: dict, here: Machine) -> tuple[torch.nn.Module, Tokenizer]:
    """Returns the model of init_from, with the fields that knobs changed, and its tokenizer.

    Documents begin with the tokenizer's eot_id: what fills up a row behind its text is no part of it.
    """
    init_from = config["init_from"]
    if not init_from:
        raise ValueError("init_from is empty: give the folder of a trained run or model, as out/sft")
    if here.dtype == "float16":
        raise ValueError(
            f"{here.name} is fast at no dtype but float16, in which small gradients are 0: --dtype=float32"
        )
    tokenizer = load.known_tokenizer(init_from)
    if tokenizer is None:
        raise ValueError(f"init_from={init_from} has no tokenizer: give a model that has one")
    variant = importlib.import_module(f"model_{config['model']}")
    chosen = {field.name: config[field.name] for field in fields(variant.GPTConfig)}
    before = start.config_of(init_from)
    for name, value in {"vocab_size": before["vocab_size"], "eot_id": tokenizer.eot_id}.items():
        if before["model"] == config["model"] and chosen[name] not in (before.get(name), value):
            raise ValueError(f"{name}={chosen[name]}, and that of init_from={init_from} is {value}: leave it out")
    chosen["vocab_size"] = before["vocab_size"]
    chosen["eot_id"] = tokenizer.eot_id
    for name, off in OFF.items():
        if chosen.get(name, off) != off:
            here.say(
                f"{name}={chosen[name]} is turned off: a token's probability must not depend on chance or the batch"
            )
            chosen[name] = off
    if chosen.get("indexer_stage") == "dense":
        raise ValueError("indexer_stage=dense trains the indexer alone, by no loss of texts: --indexer_stage=sparse")
    model = variant.GPT(variant.GPTConfig(**chosen))
    start.copy_weights(init_from, model, tokenizer, tokenizer)
    if config["kernels"]:
        here.say(f"kernels: {importlib.import_module('kernels_delta').install(model)}")
    return model.to(here.device), tokenizer


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """Returns a copy of a model as it is, which nothing trains."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def fingerprint(model: torch.nn.Module) -> str:
    """Returns a hash of what the weights of a model are: a resumed run has to find the same reference."""
    digest = hashlib.sha256()
    for name, tensor in checkpoint.weights(model).items():
        numbers = tensor.double()
        digest.update(f"{name} {numbers.sum():.6e} {numbers.square().sum():.6e}".encode())  # to rounding
    return digest.hexdigest()


def load_like(path: str, tokenizer: Tokenizer, block_size: int, device: str) -> torch.nn.Module:
    """Returns another trained model, which nothing trains. ValueError where its tokens are not those of `tokenizer`,
    or where it takes fewer than block_size of them."""
    model, its_tokenizer, _ = load.load(Path(path), device, "float32")
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{path} has the tokenizer {its_tokenizer.name}, not {tokenizer.name}, that of init_from")
    if model.config.block_size < block_size:
        raise ValueError(f"{path} has block_size={model.config.block_size}, less than {block_size}, that of the policy")
    for name, off in OFF.items():
        if hasattr(model.config, name):
            setattr(model.config, name, off)
    return model.requires_grad_(False)


def pad(
    prompts: list[list[int]], completions: list[list[int]], learned: list[list[bool]], eot_id: int, device
) -> tuple:
    """Returns inputs and targets (rows, T) of prompts with their completions, filled up at the right with eot_id.

    learned: for each token of a completion whether it is a target. Targets are -1 wherever nothing is learned.
    """
    longest = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions)) - 1
    x = torch.full((len(prompts), longest), eot_id)
    y = torch.full((len(prompts), longest), -1)
    for i, (prompt, completion, is_target) in enumerate(zip(prompts, completions, learned)):
        row = torch.tensor(prompt + completion)
        x[i, : len(row) - 1] = row[:-1]
        targets = torch.where(torch.tensor(is_target, dtype=torch.bool), torch.tensor(completion), -1)
        y[i, len(prompt) - 1 : len(row) - 1] = targets
    return x.to(device), y.to(device)


def logprobs(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probability of each target (rows, T), 0 where there is none, and the model's auxiliary loss."""
    losses, auxiliary = net(x, y, per_token=True)
    return -losses, auxiliary


@torch.no_grad()
def reference_logprobs(reference: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns what a model that nothing trains thinks of each target: its log-probability (rows, T)."""
    return logprobs(reference, x, y)[0]
