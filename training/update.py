"""One step of the optimizer behind the gradients of a batch, however they were made."""

import math

import torch

from distributed.processes import whole


def update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float, grad_clip: float
) -> float:
    """Updates the weights unless the gradient is not finite: one bad batch must not spoil them. Returns its norm.

    grad_clip: the norm that a gradient is cut down to; 0: none is.
    """
    scaler.unscale_(optimizer)
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        scaler.step(optimizer)
    if hasattr(model, "after_step"):  # after a skipped step too, or its counts would enter those of the next
        model.after_step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
