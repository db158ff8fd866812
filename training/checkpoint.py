"""Where a training run stands, in one safetensors file: what is needed to go on exactly as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters_store import durable

FORMAT = "polyclip-checkpoint/1"


@dataclass(slots=True)
class State:
    """`step` steps are done. Batches and frames come from the seed and the step's number, so nothing else is needed."""

    step: int = 0
    seconds: float = 0.0  # that the steps took
    curve: list[dict[str, Any]] = field(default_factory=list)  # validations
    losses: list[float] = field(default_factory=list)  # one a step
    best: dict[str, Any] = field(default_factory=dict)  # the point of the curve that is kept
    rival: dict[str, Any] = field(default_factory=dict)  # the point of the adapter in use
    hits: dict[str, list[float]] = field(default_factory=dict)  # of each validation caption: before, best, rival
    log_ranks: dict[str, list[float]] = field(default_factory=dict)  # the same
    kept: dict[str, Tensor] = field(default_factory=dict)  # its tensors


def save(path: Path, run: str, progress: State, tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
    """A full disk or a kill leaves the checkpoint before valid."""
    state = optimiser.state_dict()["state"]
    moments = {f"optimiser.{index}.{name}": value for index, values in state.items() for name, value in values.items()}
    everything = {
        **{f"tensor.{name}": t.detach() for name, t in tensors.items()},
        **{f"kept.{name}": t for name, t in progress.kept.items()},
        **moments,
    }
    facts = {f.name: getattr(progress, f.name) for f in fields(progress) if f.name != "kept"} | {"run": run}
    write_tensors(path, everything, {"format": FORMAT, "progress": json.dumps(facts)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file. Raises OSError, and leaves the old file, on a full disk."""
    try:
        with durable.aside(path) as part:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def restore(path: Path, run: str, tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> State | None:
    """Puts `tensors` and `optimiser` where they stood; None if there is no checkpoint of this run (equal `run`)."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["progress"])
            if facts.pop("run") != run:
                return None
            read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (FileNotFoundError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        return None
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(read[f"tensor.{name}"])
    state = optimiser.state_dict()
    state["state"] = {}
    for name, value in read.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = value
    optimiser.load_state_dict(state)
    kept = {name.removeprefix("kept."): value for name, value in read.items() if name.startswith("kept.")}
    return State(**facts, kept=kept)
