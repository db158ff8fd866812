"""The hub that open_clip's weights and tokenizers come from: asked once, within seconds, and told of in one line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from huggingface_hub import constants, get_session

SECONDS = 5.0  # for the hub's first answer; its client alone would try for 70


@contextmanager
def hub() -> Iterator[None]:
    """Inside, the hub's client uses only its cache if the hub does not answer within SECONDS.

    Raises ConnectionError for what then fails without the hub.
    """
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):
            if get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code < 500:
                answered.set()

    before = constants.HF_HUB_OFFLINE
    if not before:
        asking = threading.Thread(target=ask, daemon=True)  # the look-up of a name has no time-out of its own
        asking.start()
        asking.join(SECONDS)
    away = not before and not answered.is_set()
    constants.HF_HUB_OFFLINE = before or away
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if away:
            raise ConnectionError(f"{constants.ENDPOINT} does not answer") from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = before


def place(found: dict[str, Any]) -> str:
    """Where open_clip takes these weights from."""
    if "hf_hub" not in found:
        return str(found["url"])
    repository, _, file = found["hf_hub"].rpartition("/")
    return f"{constants.ENDPOINT}/{repository}/resolve/main/{file or 'open_clip_model.safetensors'}"


def reason(error: Exception) -> str:
    """What went wrong, in one short line."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{' '.join(str(error).split()) or type(error).__name__:.160}"
