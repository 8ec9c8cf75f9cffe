"""An average of a run's weights over its last steps, which often has a lower loss than the weights themselves.

It is the mean of all steps until there are 1 / (1 - decay) of them, and exponential from then on:
    average = decay * average + (1 - decay) * weights        (Polyak and Juditsky, 1992; Kingma and Ba, section 7.2)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from training import checkpoint
from training.stored import Stored, own_rows


class Average:
    """The average of the weights of a model, or of this process's share of them; it begins with what they are."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.steps = 0  # that it is the average of
        self.weights = checkpoint.weights(model)
        self.tensors = {name: tensor.detach().clone() for name, tensor in self.weights.items()}

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields what this process holds of each weight and of its average."""
        for name, tensor in self.weights.items():
            yield own_rows(tensor)[0], own_rows(self.tensors[name])[0]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step."""
        self.steps += 1
        share = max(1 - self.decay, 1 / self.steps)
        for own, average in self.pairs():
            if average.is_floating_point():
                average.lerp_(own, share)
            else:
                average.copy_(own)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights and their average."""
        for own, average in self.pairs():
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average in the place of the weights, and takes it back after."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def go_on_from(self, path: Path, steps: int) -> None:
        """Reads the average that a checkpoint has of so many steps. One that has none leaves it as it began."""
        stored = Stored(path, "ema")
        if not stored.parts:
            return
        self.steps = steps
        for name, tensor in self.tensors.items():
            stored.copy_to(tensor, name)
