"""Opaque page tokens over an id or an offset."""

from __future__ import annotations

import base64
import binascii
import re

from service.errors import PolyclipError

MAX_OFFSET = 10_000  # a page so far on is not given: each page of a search finds all before it again
_FORMS = {"offset": "[0-9]{1,5}", "id": "[a-z]{1,16}_[0-9a-z]{26}"}


class InvalidPageToken(PolyclipError):
    """The token is not one that this list gave out."""

    code, status, hint = "invalid_page_token", 422, "take `next_page_token` of the same list"


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
    if found != kind or not re.fullmatch(_FORMS[kind], position) or (kind == "offset" and int(position) > MAX_OFFSET):
        raise InvalidPageToken("the page token is of another list")
    return position
