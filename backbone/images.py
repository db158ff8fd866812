"""From a picture to the backbone's pixels, as open_clip's inference transform makes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EXTREME = 16  # long side to short side: beyond it, resizing the whole picture costs far more than the square that is kept


@dataclass(frozen=True, slots=True)
class Form:
    """What a backbone takes: a square of `side` pixels, of the picture's middle (`shortest`, CLIP's own) or of the whole
    picture, squeezed (`squash`). Raises ValueError for a way of resizing that is not known.
    """

    side: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.resize_mode not in ("shortest", "squash") or self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"pictures are not resized here by {self.resize_mode!r} with {self.interpolation!r}")

    def facts(self) -> dict[str, list[str]]:
        """For the backbone's fingerprint: nothing where it is CLIP's own way."""
        way = [self.resize_mode, self.interpolation]
        return {} if way == ["shortest", "bicubic"] else {"resize": way}


def to_pixels(image: Image.Image, form: Form | int) -> NDArray[np.uint8]:
    """(3, side, side) uint8 RGB of a picture of any size; an int is the side of CLIP's own form.

    The same pixels that open_clip's inference transform gives before it normalises; of a picture that is longer than
    `EXTREME` times its short side, and is to be cropped, only the middle is resized.
    """
    form = Form(form) if isinstance(form, int) else form
    size, way = form.side, Image.Resampling[form.interpolation.upper()]
    if form.resize_mode == "squash":
        return _array(image.convert("RGB").resize((size, size), way))
    width, height = image.size
    short = min(width, height)
    if max(width, height) > EXTREME * short:
        left, top = max(width - EXTREME * short, 0) // 2, max(height - EXTREME * short, 0) // 2
        image = image.crop((left, top, width - left, height - top))
    image = image.convert("RGB")
    width, height = image.size
    if short != size:
        width, height = (size, size * height // width) if width <= height else (size * width // height, size)
        image = image.resize((width, height), way)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return _array(image.crop((left, top, left + size, top + size)))


def _array(image: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
