"""What a training run is asked to do, as one frozen value that travels into the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from backbone import TEMPERATURE, AdapterShape, Scope, Start, TowerDims

Method = Literal["adapter", "full"]
Pooling = Literal["q_score", "mean"]
Precision = Literal["float32", "bfloat16"]


class InvalidRecipe(ValueError):
    """A recipe field is unknown, of another type or out of range; the message says which, in one line."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training run. The defaults suit a collection of a few hundred captioned videos.

    The learning rate is for float32: the paper's 1e-5 acts like far larger steps in its fp16 code and learns next to
    nothing here.
    """

    method: Method = "adapter"  # full: every weight of the backbone, the baseline
    rank: int = 8
    shared: int = 16  # rows of the up projections that both towers have in common; 0: sharing off
    scope: Scope = "both"
    layers: int | None = None  # only the last blocks get adapters, counted on the shallower tower; None: all
    start: Start = "identity"  # of the adapter: see AdapterShape.initial
    learning_rate: float = 5e-3
    weight_decay: float = 0.2  # on matrices; biases have none
    bias_correction: bool = True  # of Adam's moments
    batch_size: int = 32  # pairs
    micro_batch: int | None = None  # pairs encoded at once; the gradient is that of the whole batch all the same
    recompute: bool = False  # activations inside the blocks are computed again in the backward pass
    precision: Precision = "float32"
    steps: int | None = None  # optimiser steps; None: `epochs` decides, but at least `minimum_steps`
    epochs: float = 5.0
    minimum_steps: int = 300  # 1 where a recipe from outside names `epochs` and not this
    warmup: float = 0.1  # share of the steps
    gradient_clip: float = 1.0
    frames: int = 12  # of each video in a training step, one drawn at random from each of as many equal slices
    words: int | None = None  # tokens of a caption, start and end included; None: the backbone's context length
    pooling: Pooling = "q_score"
    temperature: float = TEMPERATURE
    validation: float = 0.2  # share of the videos, where the data set brings no validation split
    evaluations: int = 6  # validations, spread over the run
    folds: int = 5  # of the cross-validation where few captions are held out; 0: none
    seed: int = 42

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also false for NaN
                raise InvalidRecipe(f"recipe.{name} must be between {low:g} and {high:g}, not {value:g}")
        for name, hint in get_type_hints(type(self)).items():
            words = [word for word in get_args(hint) if isinstance(word, str)]
            if words and getattr(self, name) not in words:
                raise InvalidRecipe(f"recipe.{name} must be {_either(words)}, not {getattr(self, name)!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from outside, every field checked; `preset` names values for those not given. Raises InvalidRecipe."""
        values = dict(values)
        preset = values.pop("preset", None)
        if preset is not None and preset not in PRESETS:
            raise InvalidRecipe(f"recipe.preset must be {_either(list(PRESETS))}, not {preset!r}")
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InvalidRecipe(f"unknown recipe field {unknown[0]!r}; known are {', '.join(sorted(known | {'preset'}))}")
        clean: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {}
        for name, value in values.items():
            options = get_args(hints[name]) or (hints[name],)
            kind = next((k for k in (bool, int, float) if k in options), str)
            if value is None and type(None) in options:
                clean[name] = None
                continue
            fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise InvalidRecipe(f"recipe.{name} must be {kind.__name__}, not {type(value).__name__}")
            clean[name] = kind(value)
        if "epochs" in values and "minimum_steps" not in clean:  # whoever asks for epochs gets so many
            clean["minimum_steps"] = 1
        return cls(**clean)

    def shape(self, dims: TowerDims) -> AdapterShape:
        """The adapter's shape on towers of these dimensions. An adapter of one tower shares nothing."""
        shared = self.shared if self.scope == "both" else 0
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
        """JSON Schema of a recipe from outside: every field with its type, default, range, meaning and cost."""
        kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
        properties: dict[str, Any] = {}
        hints, defaults = get_type_hints(cls), cls().to_json()
        for name, about in FIELDS.items():
            options = get_args(hints[name]) or (hints[name],)
            words = [option for option in options if isinstance(option, str)]
            known = next((kinds[option] for option in (bool, int, float) if option in options), "string")
            low, high = RANGES.get(name, (None, None))
            facts = {"minimum": low, "maximum": high, "enum": words or None}
            kind = [known, "null"] if type(None) in options else known
            told = {key: value for key, value in facts.items() if value is not None}
            properties[name] = {"type": kind, "default": defaults[name], "description": about, **told}
        properties["preset"] = {"type": "string", "enum": list(PRESETS), "description": "Values for the fields not given."}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 256),
    "shared": (0, 4096),
    "layers": (1, 256),
    "learning_rate": (1e-8, 1.0),
    "weight_decay": (0.0, 10.0),
    "batch_size": (2, 4096),
    "micro_batch": (1, 4096),
    "steps": (1, 1_000_000),
    "epochs": (0.01, 1000),
    "minimum_steps": (1, 1_000_000),
    "warmup": (0.0, 0.9),
    "gradient_clip": (1e-6, 1e6),
    "frames": (1, 64),
    "words": (3, 4096),
    "temperature": (1e-3, 1e3),
    "validation": (0.01, 0.9),
    "evaluations": (1, 100),
    "folds": (0, 20),
    "seed": (0, 2**31),
}

FIELDS: dict[str, str] = {  # what each is and what it costs; the defaults are those of Recipe
    "method": "`adapter`, or `full`: every weight of a copy of the backbone, for comparison in `python -m training` only.",
    "rank": "Width of the bottleneck. Size, memory and time on the device grow with it.",
    "shared": "Rows of the up projections that both towers have in common; 0: none. Costs nothing.",
    "scope": "`both`, `text` or `vision`. `text` trains faster and needs no video embedded again.",
    "layers": "Only the last blocks get adapters; null: all. Fewer are faster: what lies before is computed once.",
    "start": "`identity` begins at the frozen backbone, `small` at random weights, the paper's. Costs nothing.",
    "learning_rate": "At its highest, after the warm-up. Costs nothing.",
    "weight_decay": "On matrices; biases have none. Costs nothing.",
    "bias_correction": "Of Adam's moments. Costs nothing.",
    "batch_size": "Pairs in a step. Time and memory of a step grow with it.",
    "micro_batch": "Pairs encoded at once; null: the whole batch. Less memory, more time, the same gradient.",
    "recompute": "Activations are computed again in the backward pass: less memory, more time.",
    "precision": "`float32` or `bfloat16`, which is faster on a GPU.",
    "steps": "Optimiser steps; null: `epochs` decides. Time grows with it.",
    "epochs": "Passes over all pairs, where `steps` is null. One that is given is kept; see `minimum_steps`.",
    "minimum_steps": "Least number of steps where neither `steps` nor `epochs` is given; beside `epochs`, only if given too.",
    "warmup": "Share of the steps in which the learning rate rises. Costs nothing.",
    "gradient_clip": "Largest norm of the gradient. Costs nothing.",
    "frames": "Frames of each video in a step. Time and memory of a step grow with it.",
    "words": "Tokens of a caption, start and end included; null: the backbone's context length. Fewer are faster.",
    "pooling": "Of the frames: `q_score`, which searches use, or `mean`. Costs nothing.",
    "temperature": "Of the weights of the frames in `q_score`. Costs nothing.",
    "validation": "Share of the videos that is held out. With fewer than 30 held-out captions a training takes twice as long.",
    "evaluations": "Validations during the run; each encodes all held-out videos and captions.",
    "folds": "Of the cross-validation where fewer than 30 captions are held out, about one more training together; 0: none.",
    "seed": "Of the start, the batches and the frames. Costs nothing.",
}

PRESETS: dict[str, dict[str, Any]] = {
    # Jiang et al. 2022, appendix A, with a learning rate for float32 (docs/results.md has the sweep)
    "paper": {
        "rank": 8,
        "shared": 16,
        "start": "small",
        "learning_rate": 3e-3,
        "weight_decay": 0.2,
        "bias_correction": False,
        "batch_size": 128,
        "epochs": 5.0,
        "minimum_steps": 1,
        "warmup": 0.1,
        "gradient_clip": 1.0,
        "validation": 0.05,
        "evaluations": 5,
        "seed": 42,
    },
}


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
