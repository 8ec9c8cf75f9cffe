"""A reward model: any model file as a backbone, and a number for a text in place of the next token's logits."""

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from data.tokenizers import Tokenizer
from training import checkpoint, load
from training.machine import Machine
from training.stored import Stored


class RewardModel(nn.Module):
    """Scores texts: a linear head on what the backbone makes of a text's last token. It begins with 0 for all.

    There are no targets, so a mixture of experts trains without its balance and z-losses.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.config = backbone.config
        self.backbone = backbone
        self.head = nn.Linear(self.config.n_embd, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        backbone.lm_head = None  # it writes nothing
        backbone.logits = lambda x: self.head(x)
        self.OPTIMIZER = getattr(backbone, "OPTIMIZER", {})

    def after_step(self) -> None:
        """Does what the backbone does after a step of the optimizer."""
        if hasattr(self.backbone, "after_step"):
            self.backbone.after_step()

    def forward(self, idx: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Returns the score (rows,) of each text, tokens idx (rows, T) of which the first `lengths` (rows,) count."""
        scores = self.backbone(idx)[:, :, 0]  # (rows, T)
        return scores.gather(1, lengths[:, None] - 1)[:, 0]


def side_by_side(texts: list[list[int]], eot_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns texts as idx (rows, T), filled up at the right with eot_id, and their lengths (rows,)."""
    lengths = torch.tensor([len(text) for text in texts])
    idx = torch.full((len(texts), int(lengths.max())), eot_id)
    for row, text in zip(idx, texts):
        row[: len(text)] = torch.tensor(text)
    return idx.to(device), lengths.to(device)


def load_reward_model(path: str, tokenizer: Tokenizer, device: str) -> RewardModel:
    """Returns the reward model of a run of reward.py. ValueError where it is none, or of other tokens."""
    folder = checkpoint.resolve(path)
    config = checkpoint.load_config(folder)
    if "head.weight" not in Stored(folder, "model").parts:
        raise ValueError(f"{path} is no run of reward.py")
    its_tokenizer, _ = load.find_tokenizer(Path(path), None)
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{path} has the tokenizer {its_tokenizer.name}, and the policy {tokenizer.name}")
    variant = importlib.import_module(f"model_{config['model']}")
    model = RewardModel(variant.GPT(variant.GPTConfig(**config["model_config"])))
    checkpoint.restore(folder, model)
    return model.to(device).requires_grad_(False).eval()


@torch.no_grad()
def scores_of(model: RewardModel, texts: list[list[int]], here: Machine, rows: int = 64) -> list[float]:
    """Returns the score of each text, so many of them at once."""
    found = []
    for begin in range(0, len(texts), rows):
        part = side_by_side(texts[begin : begin + rows], model.config.eot_id, here.device)
        with here.autocast():
            found += model(*part).float().tolist()
    return found


def learned_reward(path: str, tokenizer: Tokenizer, here: Machine) -> Callable:
    """Returns a reward, as evals/rewards.load takes it, of a run of reward.py: the score of a row's "tokens"."""
    model = load_reward_model(path, tokenizer, here.device)
    return lambda completions, rows: scores_of(model, [row["tokens"] for row in rows], here)
