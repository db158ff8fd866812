"""Adam with decoupled weight decay, and the variant without bias correction that the paper's released code uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from training.recipe import Recipe

BETAS, EPSILON = (0.9, 0.98), 1e-6


def optimiser_of(tensors: Mapping[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Weight decay on matrices, none on biases and other vectors."""
    matrices = [t for name, t in tensors.items() if not name.endswith("bias") and t.ndim > 1]
    others = [t for name, t in tensors.items() if name.endswith("bias") or t.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if recipe.bias_correction:
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, eps=EPSILON)
    return PlainAdam(groups, lr=recipe.learning_rate)


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
