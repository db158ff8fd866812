"""A picture that a client sends as a query: read in this process, so by few decoders and never beyond a size."""

from __future__ import annotations

import base64
import binascii
import io
import struct
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import PolyclipError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 20_000_000
DATA_URL = "data:image/"  # what a picture as a data URL begins with
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


class InvalidImage(PolyclipError, ValueError):
    """The bytes are no picture, or one that is too large."""

    code, status, hint = "invalid_image", 422, f"send JPEG, PNG, WebP, GIF or BMP of at most {MAX_PIXELS // 10**6} megapixels"


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


def data_of(url: str) -> bytes:
    """The bytes in `data:image/…;base64,…`. Raises InvalidImage."""
    head, comma, coded = url.partition(",")
    if not (head.startswith(DATA_URL) and head.endswith(";base64") and comma):
        raise InvalidImage("a picture is sent as a data URL: data:image/png;base64,…")
    try:
        return base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(f"the data URL is not base64: {error}") from error


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
