"""A backbone's two towers, each behind the same few words."""

from __future__ import annotations

from typing import Any

from open_clip.timm_model import TimmModel

from backbone.towers.residual import ResidualText, ResidualVision
from backbone.towers.timm_vision import TimmVision
from backbone.towers.tower import Apply, Tower, UnsupportedBackbone, run_blocks

__all__ = ["Apply", "ResidualText", "Tower", "UnsupportedBackbone", "run_blocks", "towers_of"]


def towers_of(name: str, model: Any) -> tuple[Tower, ResidualText]:
    """Vision and text of one of open_clip's models. Raises UnsupportedBackbone with a one-line reason."""
    visual: Any = getattr(model, "visual", None)
    text = getattr(model, "text", model)  # CustomTextCLIP keeps its text tower apart
    tower: Tower = TimmVision(name, visual) if isinstance(visual, TimmModel) else ResidualVision(name, visual)
    if visual.image_size[0] != visual.image_size[1]:
        raise UnsupportedBackbone(f"{name}: the image is not square")
    return tower, ResidualText(name, text, flat=text is model)
