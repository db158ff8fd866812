"""How far a piece of work is: the one form in which trainings, jobs and commands tell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` of a stage. `facts`: what else is known, such as the loss of a step or the recall of a validation."""

    stage: str
    done: float
    total: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """0 to 1; of nothing, all is done."""
        return self.done / self.total if self.total else 1.0

    def within(self, first: float, last: float) -> Progress:
        """The same as a part of more work, of which it is what lies between these two shares."""
        return replace(self, done=first + (last - first) * self.share, total=1.0)

    def to_json(self) -> dict[str, Any]:
        """A line of `python -m training --json`."""
        return {"event": self.stage, "step": self.done, "steps": self.total, **self.facts}

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Progress:
        facts = {name: value for name, value in line.items() if name not in ("event", "step", "steps")}
        return cls(line["event"], line["step"], line["steps"], facts)


Tell = Callable[[Progress], object]  # may raise to stop the work


def unheard(progress: Progress) -> None:
    """For work that nobody watches."""
