"""A picture that a client sends as a query, read under limits: what `Sandbox.picture` has the child do."""

from __future__ import annotations

import io
import struct
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 20_000_000
MAX_SCANS = 100  # of a JPEG: a progressive one has about ten, each costs a pass over all of it
UNREADABLE = (
    EOFError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    SyntaxError,  # Pillow's for a broken PNG
    TypeError,
    ValueError,
    Warning,  # where they are errors
    struct.error,
)


class InvalidImage(ValueError):
    """The bytes are no picture, or one that is too large."""


def read_picture(data: bytes) -> Image.Image:
    """The picture in `data` as RGB, turned right by its EXIF tag: of an animated one the first frame, what is transparent
    upon white. Its size is asked before a pixel is decoded. Raises InvalidImage.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if not 0 < width * height <= MAX_PIXELS:
            raise InvalidImage(f"the picture has {width} × {height} pixels, more than {MAX_PIXELS:,}")
        if picture.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
            raise InvalidImage(f"the picture is coded in more than {MAX_SCANS} scans")
        picture.load()
        return _rgb(_turned(picture))
    except InvalidImage:
        raise
    except UnidentifiedImageError as error:
        raise InvalidImage(f"these bytes are no picture in a format that is read here ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidImage(f"the picture has more than {MAX_PIXELS:,} pixels") from error
    except UNREADABLE as error:
        raise InvalidImage(f"the picture cannot be read: {str(error)[:200]}") from error


def _turned(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # EXIF that cannot be read: the picture can
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, which `convert` would cut off at 255
        deep: Any = picture.convert("I")
        picture = deep.point(lambda value: value * (1 / 257)).convert("L")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")
