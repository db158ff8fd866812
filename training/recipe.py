"""What a training run is asked to do, as one frozen value that is also kept in the adapter's manifest."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from backbone import TEMPERATURE, VOCABULARY_ROWS, AdapterShape, Scope, Start, TowerDims

Pooling = Literal["q_score", "mean"]


class InvalidRecipe(ValueError):
    """A recipe field is unknown, of another type or out of range; the message says which, in one line."""


class Recipe(BaseModel):
    """A training run. The defaults suit a collection of a few hundred captioned videos.

    The learning rate is for float32: the paper's 1e-5 works as far larger steps in its fp16 code, and changes little here.
    Raises pydantic's ValidationError; `of` is for values from outside.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: Literal["adapter", "full"] = "adapter"
    """`adapter`, or `full`: every weight of a copy of the backbone, for comparison in `python -m training` only."""
    rank: int = Field(8, ge=1, le=256)
    """Width of the bottleneck. Size, memory and time on the device grow with it."""
    shared: int = Field(16, ge=0, le=4096)
    """Rows of the up projections that both towers have in common; 0: none. Costs nothing."""
    scope: Scope = "both"
    """`both`, `text` or `vision`. `text` trains faster and needs no video embedded again."""
    layers: int | None = Field(None, ge=1, le=256)
    """Only the last blocks get adapters; null: all. Fewer are faster: what lies before is computed once."""
    vocabulary: Annotated[int, Field(ge=1, le=VOCABULARY_ROWS)] | Literal["auto", "off"] = "auto"
    """Rows that learn words: the tokens of the captions that need it most, so many, or as `auto` finds; `off`: none."""
    start: Start = "identity"
    """`identity` begins at the frozen backbone, `small` at random weights, the paper's. Costs nothing."""
    learning_rate: float = Field(5e-3, ge=1e-8, le=1.0)
    """At its highest, after the warm-up. Costs nothing."""
    weight_decay: float = Field(0.2, ge=0.0, le=10.0)
    """On matrices; biases have none. Costs nothing."""
    bias_correction: bool = True
    """Of Adam's moments. Costs nothing."""
    batch_size: int = Field(32, ge=2, le=4096)
    """Pairs in a step. Time and memory of a step grow with it."""
    micro_batch: int | None = Field(None, ge=1, le=4096)
    """Pairs encoded at once; null: the whole batch. Less memory, more time, the same gradient."""
    recompute: bool = False
    """Activations are computed again in the backward pass: less memory, more time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`float32` or `bfloat16`, which is faster on a GPU."""
    steps: int | None = Field(None, ge=1, le=1_000_000)
    """Optimiser steps; null: `epochs` decides. Time grows with it."""
    epochs: float = Field(5.0, ge=0.01, le=1000)
    """Passes over all pairs, where `steps` is null. One that is given is kept; see `minimum_steps`."""
    minimum_steps: int = Field(300, ge=1, le=1_000_000)
    """Least number of steps where neither `steps` nor `epochs` is given; beside `epochs`, only if given too."""
    warmup: float = Field(0.1, ge=0.0, le=0.9)
    """Share of the steps in which the learning rate rises. Costs nothing."""
    gradient_clip: float = Field(1.0, ge=1e-6, le=1e6)
    """Largest norm of the gradient. Costs nothing."""
    frames: int = Field(12, ge=1, le=64)
    """Frames of each video in a step. Time and memory of a step grow with it."""
    words: int | None = Field(None, ge=3, le=4096)
    """Tokens of a caption, start and end included; null: the backbone's context length. Fewer are faster."""
    pooling: Pooling = "q_score"
    """Of the frames: `q_score`, which searches use, or `mean`. Costs nothing."""
    temperature: float = Field(TEMPERATURE, ge=1e-3, le=1e3)
    """Of the weights of the frames in `q_score`. Costs nothing."""
    feedback: float = Field(0.5, ge=0.0, le=10.0)
    """Weight of what users said of hits against captions; 0: none. Up to a quarter more pairs are encoded in a step."""
    validation: float = Field(0.2, ge=0.01, le=0.9)
    """Share of the videos that is held out. With fewer than 30 held-out captions a training takes twice as long."""
    evaluations: int = Field(6, ge=1, le=100)
    """Validations during the run; each encodes all held-out videos and captions."""
    folds: int = Field(5, ge=0, le=20)
    """Of the cross-validation where fewer than 30 captions are held out, about one more training together; 0: none."""
    seed: int = Field(42, ge=0, le=2**31)
    """Of the start, the batches and the frames. Costs nothing."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from outside; `preset` names values for the fields not given. Raises InvalidRecipe."""
        preset: Any = values.get("preset")
        if preset is not None and preset not in list(PRESETS):
            raise InvalidRecipe(f"recipe.preset must be {' or '.join(map(repr, PRESETS))}, not {reprlib.repr(preset)}")
        given = {**PRESETS.get(preset or "", {}), **{name: value for name, value in values.items() if name != "preset"}}
        if "epochs" in values:  # who asks for epochs gets that many
            given.setdefault("minimum_steps", 1)
        try:
            return cls.model_validate(given)
        except ValidationError as errors:
            error, *others = errors.errors()
            name = error["loc"][0] if error["loc"] else error["input"]  # a field whose name is no text has no place
            if error["type"] in ("extra_forbidden", "invalid_key") or not error["loc"]:
                known = ", ".join(sorted([*cls.model_fields, "preset"]))
                raise InvalidRecipe(f"unknown recipe field {reprlib.repr(name)}; known are {known}") from errors
            rule = error["msg"].replace("Input should", "must")
            for other in others:  # of a field that takes several kinds of value
                if other["loc"][:1] == error["loc"][:1]:
                    rule += other["msg"].replace("Input should be", " or")
            raise InvalidRecipe(f"recipe.{name} {rule}, not {reprlib.repr(error['input'])}") from errors

    def shape(self, dims: TowerDims) -> AdapterShape:
        """The adapter's shape on towers of these dimensions. An adapter of one tower shares nothing. Raises InvalidRecipe."""
        shared = self.shared if self.scope == "both" else 0
        if self.scope == "vision" and isinstance(self.vocabulary, int):
            raise InvalidRecipe(f"recipe.vocabulary is {self.vocabulary}, but an adapter of scope vision learns no words")
        try:
            return AdapterShape(dims, self.rank, shared, self.scope)
        except ValueError as error:
            raise InvalidRecipe(str(error)) from error

    def check_limits(self, largest: Mapping[str, float]) -> None:
        """Raises InvalidRecipe for a field above its limit."""
        for name, limit in largest.items():
            value = getattr(self, name)
            if value is not None and value > limit:
                raise InvalidRecipe(f"recipe.{name} is {value:g}, the largest that is taken here is {limit:g}")

    def total_steps(self, pairs: int) -> int:
        """Optimiser steps over `pairs` training pairs."""
        if self.steps is not None:
            return self.steps
        return max(self.minimum_steps, round(self.epochs * pairs / self.batch_size))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of what `of` takes: every field with its type, default, range, meaning and cost."""
        preset = {"type": "string", "enum": list(PRESETS), "description": "Values for the fields not given."}
        return {
            "type": "object",
            "properties": {**cls.model_json_schema()["properties"], "preset": preset},
            "additionalProperties": False,
        }

    def to_json(self) -> dict[str, Any]:
        return self.model_dump()


PRESETS: dict[str, dict[str, Any]] = {
    # Jiang et al. 2022, appendix A, with a learning rate for float32 (docs/results.md has the sweep)
    "paper": {
        "rank": 8,
        "shared": 16,
        "vocabulary": "off",
        "start": "small",
        "learning_rate": 3e-3,
        "weight_decay": 0.2,
        "bias_correction": False,
        "batch_size": 128,
        "epochs": 5.0,
        "minimum_steps": 1,
        "warmup": 0.1,
        "gradient_clip": 1.0,
        "feedback": 0.0,
        "validation": 0.05,
        "evaluations": 5,
        "seed": 42,
    },
}
