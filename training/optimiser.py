"""Adam with decoupled weight decay, and the variant without bias correction that the paper's released code uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.recipe import Recipe

BETAS, EPSILON = (0.9, 0.98), 1e-6


def optimiser_of(tensors: Mapping[str, Tensor], recipe: Recipe, rates: Tensor | None = None) -> torch.optim.Optimizer:
    """Weight decay on matrices, none on biases and other vectors, nor on vocabulary rows, whose `rates` (V,) are shares of
    the learning rate.
    """
    decayed = {name for name, t in tensors.items() if not name.endswith("bias") and t.ndim > 1 and name != "vocabulary_rows"}
    matrices = [t for name, t in tensors.items() if name in decayed]
    others = [t for name, t in tensors.items() if name not in decayed]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimiser: torch.optim.Optimizer
    if recipe.bias_correction:
        optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, eps=EPSILON)
    else:
        optimiser = PlainAdam(groups, lr=recipe.learning_rate)
    if rates is not None:
        _slow_down(optimiser, tensors["vocabulary_rows"], rates)
    return optimiser


def _slow_down(optimiser: torch.optim.Optimizer, rows: Tensor, rates: Tensor) -> None:
    """Each of the rows (V, d) goes its share of every step."""
    before, share = rows.detach().clone(), rates[:, None]

    def note(*_: Any) -> None:
        before.copy_(rows.detach())

    @torch.no_grad()
    def slow(*_: Any) -> None:
        rows.copy_(torch.lerp(before, rows, share))

    optimiser.register_step_pre_hook(note)
    optimiser.register_step_post_hook(slow)


class PlainAdam(torch.optim.Optimizer):
    """Adam whose moments start at zero and are not corrected for it: the first steps are larger.

    Semantics: m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; x ← x - lr · (m / (√v + ε) + λx).
    """

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes no `closure`: the gradients are there already."""
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(x), torch.zeros_like(x)
                state["m"].lerp_(x.grad, 1 - BETAS[0])
                state["v"].lerp_(x.grad.square(), 1 - BETAS[1])
                update = state["m"] / (state["v"].sqrt() + EPSILON) + group["weight_decay"] * x
                x.sub_(update, alpha=group["lr"])


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: linear from 0 over the first `warmup · steps`, then a cosine to 0."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1.0, steps - rise))))
