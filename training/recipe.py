"""What a training run is asked to do, as one frozen value that travels into the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from backbone import TEMPERATURE, AdapterShape, Scope, TowerDims


class InvalidRecipe(ValueError):
    """A recipe field is unknown, of another type or out of range; the message says which, in one line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training run. The defaults suit a collection of a few hundred captioned videos.

    The learning rate is for float32: the paper's 1e-5 acts like far larger steps in its fp16 code and learns next to
    nothing here.
    """

    rank: int = 8
    shared: int = 16
    scope: Scope = "both"
    learning_rate: float = 5e-3
    weight_decay: float = 0.2  # on matrices; biases have none
    batch_size: int = 32  # pairs
    steps: int | None = None  # optimiser steps; None: `epochs` decides, but at least 300
    epochs: float = 5.0
    warmup: float = 0.1  # share of the steps
    gradient_clip: float = 1.0
    frames: int = 12  # of each video in a training step, one drawn at random from each of as many equal slices
    temperature: float = TEMPERATURE
    validation: float = 0.2  # share of the videos
    evaluations: int = 6  # validations, spread over the run
    seed: int = 42

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "rank": (1, 256),
            "shared": (0, 4096),
            "learning_rate": (1e-8, 1.0),
            "weight_decay": (0.0, 10.0),
            "batch_size": (2, 4096),
            "epochs": (0.01, 1000),
            "warmup": (0.0, 0.9),
            "gradient_clip": (1e-6, 1e6),
            "frames": (1, 64),
            "temperature": (1e-3, 1e3),
            "validation": (0.01, 0.9),
            "evaluations": (1, 100),
            "seed": (0, 2**31),
        }
        if self.steps is not None:
            ranges["steps"] = (1, 1_000_000)
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also false for NaN
                raise InvalidRecipe(f"recipe.{name} must be between {low:g} and {high:g}, not {value:g}")
        if self.scope not in ("both", "text", "vision"):
            raise InvalidRecipe(f"recipe.scope must be both, text or vision, not {self.scope!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from outside, every field checked. Raises InvalidRecipe."""
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InvalidRecipe(f"unknown recipe field {unknown[0]!r}; known are {', '.join(sorted(known))}")
        clean: dict[str, Any] = {}
        for name, value in values.items():
            wanted = float if hints[name] is float else str if name == "scope" else int
            if value is None and name == "steps":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
                raise InvalidRecipe(f"recipe.{name} must be {wanted.__name__}, not {type(value).__name__}")
            clean[name] = wanted(value)
        return cls(**clean)

    def shape(self, dims: TowerDims) -> AdapterShape:
        """The adapter's shape on towers of these dimensions. An adapter of one tower shares nothing."""
        shared = self.shared if self.scope == "both" else 0
        try:
            return AdapterShape(dims, self.rank, shared, self.scope)
        except ValueError as error:
            raise InvalidRecipe(str(error)) from error

    def total_steps(self, pairs: int) -> int:
        """Optimiser steps over `pairs` training pairs."""
        if self.steps is not None:
            return self.steps
        return max(300, round(self.epochs * pairs / self.batch_size))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
