"""Backbones that run here and are worth a choice: what they are, what they cost, and what is published of their weights.

Any other open_clip model whose towers are of the same kinds runs too. Costs are measured (`python -m bench backbones`), figures
and licences are those of the weights' publishers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

PE = "Perception Encoder (arXiv 2504.13181), github.com/facebookresearch/perception_models, apps/pe"
OPEN_CLIP = "github.com/mlfoundations/open_clip, docs/openclip_retrieval_results.csv"
STRAIGHT = "MSR-VTT: arXiv 2102.12443; COCO: " + OPEN_CLIP
CHOICES: dict[str, dict[str, Any]] = {
    "ViT-B-32": {
        "tags": {
            "openai": {"msrvtt": 31.2, "coco": 30.4, "source": STRAIGHT},
            "laion2b_s34b_b79k": {"coco": 39.3, "source": OPEN_CLIP},
        },
        "licence": "MIT",
    },
    "ViT-B-32-256": {"tags": {"datacomp_s34b_b86k": {"coco": 39.9, "source": OPEN_CLIP}}, "licence": "MIT"},
    "ViT-B-16": {"tags": {"laion2b_s34b_b88k": {"coco": 42.3, "source": OPEN_CLIP}}, "licence": "MIT"},
    "ViT-L-14": {
        "tags": {
            "openai": {"coco": 36.5, "source": OPEN_CLIP},
            "datacomp_xl_s13b_b90k": {"coco": 45.7, "source": OPEN_CLIP},
        },
        "licence": "MIT",
    },
    "PE-Core-T-16-384": {"tags": {"meta": {"msrvtt": 28.8, "coco": 33.0, "source": PE}}, "licence": "Apache-2.0"},
    "PE-Core-S-16-384": {"tags": {"meta": {"msrvtt": 39.3, "coco": 42.6, "source": PE}}, "licence": "Apache-2.0"},
    "PE-Core-B-16": {"tags": {"meta": {"msrvtt": 47.6, "coco": 50.9, "source": PE}}, "licence": "Apache-2.0"},
    "PE-Core-L-14-336": {"tags": {"meta": {"msrvtt": 50.3, "coco": 57.1, "source": PE}}, "licence": "Apache-2.0"},
    "EVA02-B-16": {"tags": {"merged2b_s8b_b131k": {"coco": 42.2, "source": OPEN_CLIP}}, "licence": "MIT"},
    "ViT-B-16-SigLIP2": {"tags": {"webli": {}}, "licence": "Apache-2.0"},
}


@dataclass(frozen=True, slots=True)
class Choice:
    """`frame` and `text`: processor time of one of each, ViT-B-32's being 1. `zero_shot`: by tag, R@1 from text in per cent."""

    name: str
    tags: tuple[str, ...]
    parameters: int
    image_size: int
    context_length: int
    frame: float
    text: float
    licence: str
    zero_shot: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choices() -> list[Choice]:
    """All of them, the cheapest frame first."""
    measured = json.loads((files("backbone") / "weights" / "costs.json").read_text())["backbones"]
    made = []
    for name, told in CHOICES.items():
        zero_shot = {tag: figures for tag, figures in told["tags"].items() if figures}
        made.append(Choice(name, tuple(told["tags"]), licence=told["licence"], zero_shot=zero_shot, **measured[name]))
    return sorted(made, key=lambda choice: choice.frame)
