"""A client that uploads, deletes, trains, switches and searches while processes die, and keeps a model of what was promised."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import httpx
import reference
from serving import Server, clip, new_tenant

TEXTS = ("a red ball", "something green", "a blue night")
FEWEST, MOST = 12, 22  # films of a collection: enough for a trainer, and on one page of a search
RECIPE = {"steps": 60, "batch_size": 4, "frames": 1, "rank": 2, "shared": 0, "evaluations": 2, "folds": 0}


class Broken(AssertionError):
    """The service has broken a promise."""


def must(holds: bool, promise: str, found: object = "") -> None:
    if not holds:
        raise Broken(f"promised: {promise}\nfound: {found}")


@dataclass
class Film:
    """One upload. `video_id` None: the service never answered it. `fate`: kept, leaving (deleted, no answer), gone."""

    number: int
    key: str
    video_id: str | None = None
    ready: bool = False  # when the service was last at rest
    fate: str = "kept"


@dataclass
class Shelf:
    """A collection, as far as the client knows it."""

    name: str
    films: dict[int, Film] = field(default_factory=dict)
    weights: dict[str | None, bytes | None] = field(default_factory=lambda: {None: None})  # by adapter; None: zero-shot
    active: str | None = None  # when the service was last at rest
    tasks: set[str] = field(default_factory=set)  # acknowledged since then
    seen: set[str] = field(default_factory=set)  # tasks that had ended then

    def kept(self) -> list[Film]:
        return [film for film in list(self.films.values()) if film.video_id is not None and film.fate == "kept"]


class Client:
    """Every request that ends without an answer is only forgiven if the API process has died."""

    def __init__(self, data: Path) -> None:
        weights = data.with_name("other.safetensors")
        reference.other_weights(weights)
        self.backbones = [{"name": "builtin"}, {"name": "builtin", "pretrained": str(weights)}]
        os.environ["POLYCLIP_BACKBONES"] = json.dumps([f"builtin:{weights}"])
        self.server = Server(data)
        self.shelves = [Shelf("north"), Shelf("south")]
        # collection, backbone, adapter, text, film, score
        self.answers: set[tuple[str, str, str | None, str, int, float]] = set()
        self.asked = 0  # searches
        self._numbers = itertools.count()

    def begin(self) -> None:
        """A service, a tenant, and in each of its collections some films."""
        self.tenant = new_tenant(self._start())
        for shelf in self.shelves:
            self.tenant.collection(shelf.name)
            for _ in range(FEWEST + 2):
                self.upload(shelf, Random())

    def restart(self) -> None:
        """Starts the service again, whose API process has ended."""
        self.server.client.close()
        self.tenant = replace(self.tenant, client=self._start())

    def _start(self) -> httpx.Client:
        self.server.start().client.close()  # ours drops an idle connection before the service does, which looks like a crash
        limits = httpx.Limits(keepalive_expiry=2)
        self.server.client = httpx.Client(base_url=self.server.client.base_url, timeout=60, limits=limits)
        return self.server.client

    def ask(self, method: str, path: str, **request: Any) -> Any:
        """The answer, None if the API died over it."""
        process = self.server.process
        try:
            answer = self.tenant.call(method, path, **request)
        except httpx.TransportError as error:
            patience = time.monotonic() + 2
            while process.poll() is None:
                must(time.monotonic() < patience, f"{method} {path} is answered while the API lives", repr(error))
                time.sleep(0.02)
            return None
        must(answer.status_code < 500, f"no answer of 500 or more to {method} {path}", answer.text)
        return answer

    # --- what it does to a collection

    def upload(self, shelf: Shelf, random: Random) -> None:
        number = next(self._numbers)
        shelf.films[number] = Film(number, f"film-{number}")
        self.send(shelf, shelf.films[number])

    def send(self, shelf: Shelf, film: Film) -> None:
        """Uploads a film, or asks again, under the key of the first time, whether it is there."""
        number = film.number
        fields = {"metadata": f'{{"number": {number}}}', "captions": f'["colour {number}", "hue {number}"]'}
        parts = {"data": fields, "files": {"file": (f"{number}.mp4", clip(number), "video/mp4")}}
        answer = self.ask("POST", f"/collections/{shelf.name}/videos", headers={"Idempotency-Key": film.key}, **parts)
        if answer is not None:
            must(answer.status_code == 202 and not answer.json()["duplicate_of"], f"film {number} is accepted", answer.text)
            film.video_id = answer.json()["video_id"]

    def delete(self, shelf: Shelf, random: Random) -> None:
        if len(ready := [film for film in shelf.kept() if film.ready]) > FEWEST:
            self.remove(shelf, random.choice(ready if random.random() < 0.5 else shelf.kept()))

    def remove(self, shelf: Shelf, film: Film) -> None:
        again, film.fate = film.fate == "leaving", "leaving"
        answer = self.ask("DELETE", f"/collections/{shelf.name}/videos/{film.video_id}")
        if answer is not None:
            must(answer.status_code == 204 or (again and answer.status_code == 404), f"{film} can be deleted", answer.text)
            film.fate = "gone"

    def publish(self, shelf: Shelf, random: Random) -> None:
        """Imports a new adapter and switches to it."""
        weights = reference.strange_adapter(random.getrandbits(32), random.choice(["both", "both", "both", "text"]))
        path = f"/admin/collections/{shelf.name}/adapters/import"
        answer = self.ask("POST", path, files={"file": ("adapter.safetensors", weights)})
        if answer is not None:
            must(answer.status_code == 202, "an adapter's file is accepted", answer.text)
            shelf.weights[answer.json()["adapter_id"]] = weights
            self._activate(shelf, {"adapter_id": answer.json()["adapter_id"]})

    def switch(self, shelf: Shelf, random: Random) -> None:
        """To an adapter that was in use before, or back to the frozen backbone."""
        known = sorted(list(shelf.weights)[-4:], key=str)
        self._activate(shelf, {"adapter_id": random.choice([None, *known])})

    def change(self, shelf: Shelf, random: Random) -> None:
        """To the other backbone, or back."""
        self._activate(shelf, {"backbone": random.choice(self.backbones)})

    def train(self, shelf: Shelf, random: Random) -> None:
        body = {"recipe": {**RECIPE, "seed": random.getrandbits(16)}, "activate": "always"}
        self._task(shelf, self.ask("POST", f"/admin/collections/{shelf.name}/adapters", json=body))

    def _activate(self, shelf: Shelf, wish: dict[str, Any]) -> None:
        self._task(shelf, self.ask("POST", f"/admin/collections/{shelf.name}/activate", json=wish))

    def _task(self, shelf: Shelf, answer: Any) -> None:
        if answer is not None:
            must(answer.status_code == 202, "a task is accepted", answer.text)
            shelf.tasks.add(answer.json()["task_id"])

    # --- what it asks all the time

    def search(self, shelf: Shelf, text: str) -> bool:
        """One page with every hit: the films that are ready are on it, the deleted ones are not. False: no answer."""
        ready = {film.video_id for film in shelf.kept() if film.ready}
        gone = {film.video_id for film in list(shelf.films.values()) if film.fate == "gone"}
        answer = self.ask("POST", "/search", role="search", json={"collection": shelf.name, "text": text, "page_limit": 50})
        if answer is None:
            return False
        must(answer.status_code == 200, "a search is answered", answer.text)
        page = answer.json()
        found = [hit["video_id"] for hit in page["data"]]
        must(len(found) == len(set(found)), "a search finds a video once", found)
        ready -= {film.video_id for film in list(shelf.films.values()) if film.fate != "kept"}
        must(ready <= set(found), f"a search of {shelf.name} finds every ready video", sorted(map(str, ready - set(found))))
        must(not gone & set(found), f"a search of {shelf.name} finds no deleted video", sorted(map(str, gone & set(found))))
        maker = page["search_pool"]["backbone"]["fingerprint"], page["search_pool"]["adapter"]
        scores = {(hit["metadata"]["number"], round(hit["score"], 4)) for hit in page["data"]}
        self.answers |= {(shelf.name, *maker, text, *told) for told in scores}
        self.asked += 1
        return True


class Traffic:
    """Two threads beside the crash: one searches without pause, one writes what it is told, then (`more`) what it draws."""

    def __init__(self, client: Client, first: Sequence[str], random: Random, more: bool = True) -> None:
        self._client = client
        self._quiet, self._stop = threading.Event(), threading.Event()
        self._broken: list[Exception] = []
        self.done: list[str] = []
        searching = (self._search, Random(random.getrandbits(32)))
        writing = (self._write, Random(random.getrandbits(32)), first, more)
        self._threads = [threading.Thread(target=self._guard, args=work) for work in (searching, writing)]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raises what a thread has found broken."""
        if self._broken:
            raise self._broken[0]

    def hush(self, seconds: float) -> None:
        """Ends the writing after so many seconds; the searches go on."""
        self._quiet.wait(seconds)
        self._quiet.set()
        self._threads[1].join()

    def end(self) -> None:
        self._stop.set()
        self.hush(0)
        self._threads[0].join()
        self.check()

    def _guard(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._broken.append(error)

    def _search(self, random: Random) -> None:
        while not self._stop.wait(0.03):
            if not self._client.search(random.choice(self._client.shelves), random.choice(TEXTS)):
                return

    def _write(self, random: Random, first: Sequence[str], more: bool) -> None:
        drawn = (
            random.choices(("upload", "delete", "switch", "publish", "change"), (6, 3, 2, 1, 1))[0] for _ in itertools.count()
        )
        for order in itertools.chain(first, drawn if more else ()):
            shelf = random.choice(self._client.shelves)
            if order == "upload" and len(shelf.kept()) >= MOST:
                order = "delete"
            getattr(self._client, order)(shelf, random)
            self.done.append(order)
            pause = random.uniform(0, 0.3) * (1 + len(self.done) / 3)  # slower and slower, so that a rest is not far
            if self._quiet.wait(pause) or self._client.server.process.poll() is not None:
                return
