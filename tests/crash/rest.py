"""What must hold when the service has come to rest: every promise to the client, and what its own files say about it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

from client import TEXTS, Client, Shelf, must
from reference import score
from serving import clip

from service.cli.parts import Parts
from service.settings import Settings
from service.upkeep import delete
from service.upkeep.fsck import Fsck

REST_SECONDS = 300.0
TOLERANCE = 2e-3  # of a score: vectors are kept as float16
ENDS = {"index_video": ("succeeded", "cancelled")}  # cancelled: the video was deleted meanwhile


def compare(client: Client, random: Random, trainer_killed: bool) -> None:
    """Waits until every task has ended, clears up what was left without an answer, and compares. Raises Broken."""
    _wait(client)
    for shelf in client.shelves:
        _clear_up(client, shelf, random)
    _wait(client)
    for shelf in client.shelves:
        _videos(client, shelf, random)
        _tasks(client, shelf, trainer_killed)
        _searches(client, shelf)
    _scores(client)
    _files(client)


def _wait(client: Client) -> None:
    deadline = time.monotonic() + REST_SECONDS
    while open_tasks := [*_pages(client, "/tasks", status="queued"), *_pages(client, "/tasks", status="running")]:
        must(time.monotonic() < deadline, f"every task ends within {REST_SECONDS:.0f} s", open_tasks)
        time.sleep(0.1)


def _clear_up(client: Client, shelf: Shelf, random: Random) -> None:
    """An upload without an answer is there once or not at all, and once when it is sent again under its key; a deletion without
    an answer may be asked for again."""
    listed = {video["user_metadata"]["number"]: video["video_id"] for video in _listed(client, shelf)}
    for film in [film for film in shelf.films.values() if film.video_id is None]:
        was = listed.get(film.number)
        if random.random() < 0.5:
            client.send(shelf, film)
            must(was in (None, film.video_id), f"film {film.number} keeps its id when it is sent again", (was, film.video_id))
        elif was is None:
            del shelf.films[film.number]
        else:
            film.video_id = was
    for film in [film for film in shelf.films.values() if film.fate == "leaving"]:
        if random.random() < 0.5:
            client.remove(shelf, film)
        else:
            film.fate = "kept" if film.number in listed else "gone"


def _videos(client: Client, shelf: Shelf, random: Random) -> None:
    listed = {video["video_id"]: video for video in _listed(client, shelf)}
    kept = {str(film.video_id): film for film in shelf.kept()}
    must(listed.keys() == kept.keys(), f"{shelf.name} lists what was accepted and not deleted", _difference(listed, kept))
    for video_id, film in kept.items():
        video, number = listed[video_id], film.number
        must(video["status"] == "ready", f"film {number} ends ready", video)
        told = (video["user_metadata"], [caption["text"] for caption in video["captions"]], video["system_metadata"]["sha256"])
        sent = ({"number": number}, [f"colour {number}", f"hue {number}"], hashlib.sha256(clip(number)).hexdigest())
        must(told == sent, f"film {number} is what was sent: {sent}", told)
        film.ready = True


def _tasks(client: Client, shelf: Shelf, trainer_killed: bool) -> None:
    """Every acknowledged task has ended as it should, and the adapter in use is that of the switch that was asked for last."""
    known = {task["id"]: task for task in _pages(client, "/tasks", collection=shelf.name)}
    must(shelf.tasks <= known.keys(), "every acknowledged task is listed", shelf.tasks - known.keys())
    switched = []
    for task in [task for id, task in known.items() if id not in shelf.seen]:
        killed = task["kind"] == "train_adapter" and trainer_killed and (task["error"] or {}).get("code") == "training_crashed"
        must(killed or task["status"] in ENDS.get(task["kind"], ("succeeded",)), "every task succeeds", task)
        result: dict[str, Any] = task["result"] or {}
        if task["kind"] == "train_adapter" and not killed:
            answer = client.ask("GET", f"/collections/{shelf.name}/adapters/{result['adapter_id']}/weights")
            must(answer.status_code == 200, "a trained adapter can be fetched", answer.text)
            shelf.weights[result["adapter_id"]] = answer.content
        if result.get("activated"):
            asked = result.get("trained_at", task["created_at"])
            switched.append((asked, result["adapter_id"], result.get("backbone")))
    _, shelf.active, changed = max(switched, key=lambda switch: switch[0], default=("", shelf.active, None))
    found = client.ask("GET", f"/collections/{shelf.name}").json()
    active, backbone = found["active_adapter"], found["backbone"]["pretrained"]
    if changed is not None:
        wanted = changed["pretrained"] and Path(changed["pretrained"]).name
        must(backbone == wanted, f"{shelf.name} is on the backbone {changed} that was asked for last", backbone)
    must(active == shelf.active, f"{shelf.name} uses adapter {shelf.active}, of the switches {switched}", active)
    shelf.tasks, shelf.seen = set(), set(known)


def _searches(client: Client, shelf: Shelf) -> None:
    """Page after page, a search finds every ready film once."""
    kept = {str(film.video_id): film.number for film in shelf.kept()}
    for text in TEXTS:
        client.search(shelf, text)
    found = client.tenant.found(shelf.name, TEXTS[0], page_limit=7)
    must(sorted(found) == sorted(kept), f"a search of {shelf.name} finds every video once", _difference(found, kept))


def _scores(client: Client) -> None:
    """Every answer since the last rest was computed with the backbone and adapter that it names, and with these alone."""
    weights = {shelf.name: shelf.weights for shelf in client.shelves}
    for name, backbone, adapter, text, number, told in client.answers:
        must(adapter in weights[name], f"an answer of {name} names an adapter of {name}", adapter)
        right = score(backbone, weights[name][adapter], text, number)
        must(abs(told - right) < TOLERANCE, f"film {number} scores {right:.4f} for {text!r} with adapter {adapter}", told)
    client.answers.clear()


def _files(client: Client) -> None:
    """The databases are sound; rows, vectors and files belong together; nothing is half-built."""
    data = client.server.data
    for name in ("polyclip.sqlite", "jobs.sqlite"):
        with closing(_open(data / name)) as database:
            (sound,) = database.execute("PRAGMA integrity_check").fetchone()
            must(sound == "ok", f"{name} is sound", sound)
    with closing(_open(data / "polyclip.sqlite")) as database:

        def rows(query: str) -> list[Any]:
            return database.execute(query).fetchall()

        broken = rows("SELECT id FROM generations WHERE state = 'building'")
        must(not broken, "no generation is half-built when no task is open", broken)
        active = rows(
            "SELECT c.id FROM collections c LEFT JOIN generations g ON g.collection_id = c.id AND g.state = 'active'"
            " WHERE c.deleted_at IS NULL GROUP BY c.id HAVING count(g.id) != 1 OR max(g.id) != c.active_generation_id"
        )
        must(not active, "a collection has one active generation, the one that it names", active)
        bare = rows(
            "SELECT v.id, g.vector_set, count(s.seq) FROM videos v"
            " JOIN generations g ON g.collection_id = v.collection_id AND g.state = 'active'"
            " LEFT JOIN segments s ON s.vector_set = g.vector_set AND s.video_id = v.id AND s.ordinal >= 0"
            " WHERE v.deleted_at IS NULL GROUP BY v.id HAVING count(s.seq) != json_extract(v.media, '$.segments')"
        )
        must(not bare, "every video has the vectors of its segments, once", bare)
        ghosts = rows(
            "SELECT s.vector_set, s.video_id FROM segments s JOIN videos v ON v.id = s.video_id"
            " WHERE v.deleted_at IS NOT NULL AND s.ordinal >= 0"
        )
        must(not ghosts, "a deleted video has no vectors", ghosts)
        for video, collection, sha256 in rows("SELECT id, collection_id, sha256 FROM videos WHERE deleted_at IS NULL"):
            lacks = [path for path in _files_of(data, collection, video) if not path.exists()]
            must(not lacks, f"{video} has its file, its frames and its thumbnail", lacks)
            file = next(_files_of(data, collection, video))
            must(hashlib.sha256(file.read_bytes()).hexdigest() == sha256, f"{file} is what was sent")
        for shelf in client.shelves:
            (collection,) = rows(f"SELECT id FROM collections WHERE name = '{shelf.name}'")[0]
            gone = [film.video_id for film in shelf.films.values() if film.fate == "gone"]
            left = [file for video in gone if (file := next(_files_of(data, collection, str(video)))).exists()]
            must(not left, "the files of deleted videos are gone", left)


def swept(data: Path) -> int:
    """What crashes have left without an owner is found by the sweep, and then every file has a row; how many there were."""
    files = {path for path in (data / "blobs").rglob("*") if path.is_file()}
    parts = Parts.over(Settings(data=data))
    delete.sweep(parts.storage, grace=0)
    findings = [finding.to_json() for finding in Fsck(parts.storage, parts.encoder, parts.decoders, deep=True).run()]
    parts.close()
    must(not findings, "after the sweep `polyclip fsck --deep` finds nothing", findings)
    with closing(_open(data / "polyclip.sqlite")) as database:
        videos = database.execute("SELECT collection_id, id FROM videos").fetchall()
        owned = {file for collection, video in videos for file in _files_of(data, collection, video)}
        for collection, digest in database.execute("SELECT collection_id, digest FROM adapters"):
            owned.add(data / "blobs" / "adapters" / collection / f"{digest}.safetensors")
    left = {path for path in (data / "blobs").rglob("*") if path.is_file()}
    must(left == owned, "after the sweep there are the files that have a row, and no other", left ^ owned)
    return len(files - left)


def _files_of(data: Path, collection: str, video: str) -> Iterator[Path]:
    blobs = data / "blobs"
    yield blobs / "videos" / collection / video
    yield blobs / "frames" / collection / f"{video}.zip"
    yield blobs / "thumbnails" / collection / video / "0000.jpg"


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)


def _listed(client: Client, shelf: Shelf) -> list[Any]:
    listed = list(_pages(client, f"/collections/{shelf.name}/videos"))
    numbers = [video["user_metadata"]["number"] for video in listed]
    must(len(set(numbers)) == len(numbers), f"{shelf.name} lists a film once", sorted(numbers))
    return listed


def _pages(client: Client, path: str, **params: Any) -> Iterator[Any]:
    token = None
    while True:
        page = client.ask("GET", path, params={**params, "page_limit": 50, **({"page_token": token} if token else {})}).json()
        yield from page["data"]
        if (token := page["page_info"]["next_page_token"]) is None:
            return


def _difference(found: Any, expected: Any) -> str:
    found, expected = set(found), set(expected)
    return json.dumps({"lacks": sorted(expected - found), "has besides": sorted(found - expected)})
