"""The backbones of a data folder: its own, which new collections get, and those that collections were changed to.

At most two are in memory, the folder's own and one beside it, so of the others only one may be in use at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy import Connection

from backbone import BUILTIN, RANDOM, pretrained_tags
from service.errors import PolyclipError
from service.settings import Settings
from service.storage import facts, generation_rows
from service.storage.storage import Storage

if TYPE_CHECKING:
    from service.adapters.encoder import Encoder

log = structlog.get_logger()

AGAIN_SECONDS = 60.0  # after which searches have a backbone loaded again that could not be


class OtherBackbone(PolyclipError):
    """The data folder, or a generation in it, was made with another backbone than the one at hand."""

    code, status, task_code, hint = (
        "other_backbone",
        503,
        "adapter_unusable",
        "start with the data folder's own backbone",
    )


class TooManyBackbones(PolyclipError):
    """Collections of the data folder use another backbone beside its own already; a third would not stay in memory."""

    code, status, hint = (
        "too_many_backbones",
        409,
        "change the other collections first, or start with `--backbone` of the one that they use",
    )


class BackboneNotOffered(PolyclipError):
    """No collection can be changed to this backbone here."""

    code, status, hint = "backbone_not_offered", 422, "take one of `GET /backbones`, or have it added to POLYCLIP_BACKBONES"


@dataclass(frozen=True, slots=True)
class BackboneChoice:
    """An architecture and its weights, as `load_backbone` takes them."""

    name: str
    pretrained: str | None

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> BackboneChoice:
        return cls(told["name"], told.get("pretrained"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def shown(self) -> dict[str, Any]:
        """As tenants see it: of a file its name, not where it lies."""
        file = self.pretrained is not None and Path(self.pretrained).is_absolute()
        return {"name": self.name, "pretrained": Path(str(self.pretrained)).name if file else self.pretrained}

    @property
    def caution(self) -> str | None:
        """What its searches are worth where it has not learned from real pictures, and which one has."""
        real = "for real videos change to another one, or take a new data folder and `--backbone ViT-B-32 --pretrained openai`"
        if self.pretrained == RANDOM:
            return f"this backbone has random weights, for tests and benchmarks: what it finds means nothing; {real}"
        if self.name == BUILTIN and self.pretrained is None:
            return f"the built-in backbone knows only the drawn world of `polyclip demo`: {real}"
        return None


def remember(connection: Connection, choice: BackboneChoice, fingerprint: str) -> dict[str, Any]:
    """Writes down which backbone has this fingerprint, and returns that."""
    pretrained = choice.pretrained
    if pretrained is not None and Path(pretrained).is_file():
        pretrained = str(Path(pretrained).absolute())
    told = {"name": choice.name, "pretrained": pretrained, "fingerprint": fingerprint}
    facts.set_fact(connection, f"backbone:{fingerprint}", told)
    return told


def claimed(connection: Connection, choice: BackboneChoice, fingerprint: str) -> dict[str, Any]:
    """The data folder's own backbone from now on: this one, where it has none or its collections use this one already."""
    told = remember(connection, choice, fingerprint)
    if fingerprint in generation_rows.backbones_in_use(connection):
        facts.set_fact(connection, "backbone", told)
        return told
    return facts.keep_fact(connection, "backbone", told)  # type: ignore[no-any-return]


def known(connection: Connection, fingerprint: str) -> BackboneChoice | None:
    """Which backbone had this fingerprint when it was last loaded here."""
    told = facts.fact(connection, f"backbone:{fingerprint}")
    if told is None and (own := facts.fact(connection, "backbone")) and own["fingerprint"] == fingerprint:
        told = own  # of a version that kept no others
    return None if told is None else BackboneChoice.of(told)


def described(connection: Connection, fingerprint: str) -> dict[str, Any]:
    """Name, weights and fingerprint of a backbone that a generation was made with."""
    choice = known(connection, fingerprint)
    return {**(choice or BackboneChoice("unknown", None)).shown(), "fingerprint": fingerprint}


def known_backbones(connection: Connection) -> list[dict[str, Any]]:
    """Name, weights and fingerprint of each that has been loaded here, the data folder's own first."""
    own = facts.fact(connection, "backbone")
    others = facts.facts_named(connection, "backbone:")
    return [own, *(told for told in others if told["fingerprint"] != own["fingerprint"])]


def fingerprint_of(connection: Connection, choice: BackboneChoice) -> str | None:
    """What this backbone's fingerprint was when it was last loaded here; None if it never was."""
    theirs = (told for told in known_backbones(connection) if BackboneChoice.of(told) == choice)
    return next((str(told["fingerprint"]) for told in theirs), None)


def usable(connection: Connection, fingerprint: str | None) -> bool:
    """Whether a collection may use this backbone (None: one that is new here): the folder's own, the one beside it, or any
    where there is none beside it.
    """
    own = facts.fact(connection, "backbone")["fingerprint"]
    return fingerprint == own or generation_rows.backbones_in_use(connection) <= {own, fingerprint}


def check_usable(connection: Connection, fingerprint: str | None) -> None:
    """Raises TooManyBackbones."""
    if not usable(connection, fingerprint):
        own = facts.fact(connection, "backbone")["fingerprint"]
        others = (described(connection, each) for each in generation_rows.backbones_in_use(connection) - {own})
        names = ", ".join(sorted(other["name"] for other in others))
        raise TooManyBackbones(f"collections here use {names} beside the data folder's own backbone")


def asked_for(connection: Connection, settings: Settings, name: str, pretrained: str | None) -> BackboneChoice:
    """The backbone that somebody means who has seen it `shown`, or names it. Raises BackboneNotOffered."""
    asked = BackboneChoice(name, pretrained)
    theirs = [BackboneChoice.of(told) for told in known_backbones(connection)]
    found = next((choice for choice in theirs if choice.shown() == asked.to_json()), asked)
    if found != theirs[0]:  # the folder's own needs no leave
        check_offered(settings, found)
    return found


def check_offered(settings: Settings, choice: BackboneChoice) -> None:
    """Raises BackboneNotOffered. Where POLYCLIP_BACKBONES does not name what may be asked for, it is the built-in backbone, and
    open_clip's with the weights that it knows; never a file of this machine or somebody's repository.
    """
    asked = choice.name if choice.pretrained is None else f"{choice.name}:{choice.pretrained}"
    if settings.backbones is not None:
        if asked not in settings.backbones:
            raise BackboneNotOffered(f"{asked!r:.120} is not one of {', '.join(settings.backbones) or 'none'}")
    elif choice != BackboneChoice(BUILTIN, None):
        tags = pretrained_tags(choice.name)
        if choice.pretrained not in tags:
            what = f"its weights are {', '.join(tags)}" if tags else "there is no such architecture"
            raise BackboneNotOffered(f"{asked!r:.120} is not offered: {what}")


class Beside:
    """The encoder of another backbone than the data folder's own: loaded when it is asked for, one at a time.

    The one before it goes when the next is loaded; what it was asked until then it still answers.
    """

    def __init__(self, storage: Storage, make: Callable[[BackboneChoice], Encoder]) -> None:
        self._storage, self._make = storage, make
        self._lock = threading.Lock()
        self._loading: dict[BackboneChoice, Future[Encoder]] = {}
        self._held: tuple[BackboneChoice, Encoder] | None = None
        self._failed: tuple[BackboneChoice, float, Future[Encoder]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="backbones")

    @property
    def held(self) -> Encoder | None:
        return self._held[1] if self._held else None

    def request(self, fingerprint: str) -> Future[Encoder]:
        """The encoder of the backbone with this fingerprint, on its way. Raises OtherBackbone; the future may hold it too, or
        BackboneNotFound, UnsupportedBackbone.
        """
        if (held := self.held) is not None and held.backbone.fingerprint == fingerprint:
            done: Future[Encoder] = Future()
            done.set_result(held)
            return done
        with self._storage.database.read() as connection:
            choice = known(connection, fingerprint)
        if choice is None:
            raise OtherBackbone(f"backbone {fingerprint[:12]} is not known here")
        return self.load(choice, fingerprint)

    def load(self, choice: BackboneChoice, fingerprint: str | None = None) -> Future[Encoder]:
        """The encoder of a backbone by its name, and `fingerprint`, if that is known: then a failure is kept for a while."""
        with self._lock:
            failed = self._failed
            if fingerprint and failed and failed[0] == choice and time.monotonic() - failed[1] < AGAIN_SECONDS:
                return failed[2]
            if self._held is not None and self._held[0] == choice:
                done: Future[Encoder] = Future()
                done.set_result(self._held[1])
                return done
            if choice not in self._loading:
                self._loading[choice] = self._thread.submit(self._loaded, choice, fingerprint)
            return self._loading[choice]

    def _loaded(self, choice: BackboneChoice, fingerprint: str | None) -> Encoder:
        try:
            with self._lock:
                before, self._held = self._held, None
            if before is not None:
                threading.Thread(target=self._closed_later, args=(before[1],), daemon=True).start()
                del before
            started = time.monotonic()
            encoder = self._make(choice)
            found = encoder.backbone.fingerprint
            if fingerprint not in (None, found):
                raise OtherBackbone(f"{choice.name} has other weights now: {found[:12]}, not {fingerprint:.12}")
            encoder.warm()
            with self._storage.database.write() as connection:
                remember(connection, choice, found)
            log.info("backbone_loaded", name=choice.name, fingerprint=found[:12], seconds=round(time.monotonic() - started, 1))
            self._held = choice, encoder
            return encoder
        except Exception:
            self._failed = choice, time.monotonic(), self._loading[choice]
            raise
        finally:
            with self._lock:
                del self._loading[choice]

    def _closed_later(self, encoder: Encoder) -> None:
        time.sleep(self._storage.settings.search_seconds)  # searches that had begun
        encoder.close()

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self.held is not None:
            self.held.close()
