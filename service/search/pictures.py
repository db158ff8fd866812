"""Pictures that clients send as queries, read in a child process as videos are."""

from __future__ import annotations

import base64
import binascii
import tempfile
from pathlib import Path

from PIL import Image

from indexer.pictures import InvalidImage
from indexer.sandbox import Sandbox
from indexer.sandbox_child import Limits
from service.settings import Settings

DATA_URL = "data:image/"  # what a picture as a data URL begins with
LIMITS = Limits(memory_bytes=1 << 30, cpu_seconds=20, wall_seconds=30.0)  # of one picture


class Pictures:
    """Reads pictures, one after the other; the child starts with the first. Safe to use from several threads."""

    def __init__(self, settings: Settings) -> None:
        self._scratch, self._sandbox = settings.scratch, Sandbox(LIMITS)

    def read(self, data: bytes) -> Image.Image:
        """As `indexer.pictures.read_picture`. Raises InvalidImage, OSError (a full disk)."""
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="picture-") as name:
            return self._sandbox.picture(data, Path(name))

    def close(self) -> None:
        self._sandbox.close()


def data_of(url: str) -> bytes:
    """The bytes in `data:image/…;base64,…`. Raises InvalidImage."""
    head, comma, coded = url.partition(",")
    if not (head.startswith(DATA_URL) and head.endswith(";base64") and comma):
        raise InvalidImage("a picture is sent as a data URL: data:image/png;base64,…")
    try:
        return base64.b64decode(coded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(f"the data URL is not base64: {error}") from error
