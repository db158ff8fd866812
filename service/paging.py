"""Opaque page tokens over an id or an offset."""

from __future__ import annotations

import base64
import binascii
import re


class InvalidPageToken(ValueError):
    """The token is not one that this list gave out."""


def encode(kind: str, position: str | None) -> str | None:
    """None where there is no next page."""
    if position is None:
        return None
    return base64.urlsafe_b64encode(f"{kind}:{position}".encode()).decode().rstrip("=")


def decode(kind: str, token: str | None) -> str | None:
    """Raises InvalidPageToken."""
    if token is None:
        return None
    try:
        found, position = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode().split(":", 1)
    except (binascii.Error, ValueError) as error:
        raise InvalidPageToken("the page token is not one of ours") from error
    if found != kind or (kind == "offset" and not re.fullmatch("[0-9]{1,15}", position)):
        raise InvalidPageToken("the page token is of another list")
    return position
