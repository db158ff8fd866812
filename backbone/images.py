"""From a picture to the backbone's pixels: CLIP's own resize and crop (bicubic short side, centre crop)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """(3, size, size) uint8 RGB of a picture of any size, cropped to its centre square.

    The same pixels that open_clip's inference transform gives before it normalises.
    """
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = (size, size * height // width) if width <= height else (size * width // height, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
