"""From a picture to the backbone's pixels: CLIP's own resize and crop (bicubic short side, centre crop)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EXTREME = 16  # long side to short side: beyond it, resizing the whole picture costs far more than the square that is kept


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """(3, size, size) uint8 RGB of a picture of any size, cropped to its centre square.

    The same pixels that open_clip's inference transform gives before it normalises; of a picture that is longer than
    `EXTREME` times its short side only the middle is resized.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > EXTREME * short:
        left, top = max(width - EXTREME * short, 0) // 2, max(height - EXTREME * short, 0) // 2
        image = image.crop((left, top, width - left, height - top))
    image = image.convert("RGB")
    width, height = image.size
    if short != size:
        width, height = (size, size * height // width) if width <= height else (size * width // height, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
