"""`polyclip demo`: three small worlds, two tenants, a real service, and an adapter that makes one of them findable.

The first world can be searched while the others are drawn. Everything but the drawing goes through HTTP, as a user's own
program would.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from demo.phrases import draw_phrase
from demo.worlds import scenes, write_world
from service.errors import PolyclipError

console = Console(highlight=False)
COLUMNS = (
    TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    TextColumn("left:"), TimeRemainingColumn(),
)  # fmt: skip
RECIPE: dict[str, Any] = {"steps": 400, "batch_size": 32, "frames": 1, "learning_rate": 8e-3}
BASE_RIGHT, GAIN = 90.0, 30.0  # per cent of base queries that must be right; points of R@1 that the adapter must bring


@dataclass(frozen=True, slots=True)
class Collection:
    """One demo collection: a world's clips under a tenant."""

    tenant: str
    name: str
    clips: int
    seed: int


COLLECTIONS = (
    Collection("acme", "daylight", 100, 11),
    Collection("acme", "nightwatch", 400, 12),
    Collection("borealis", "blueprint", 80, 13),
)
TRAINED = COLLECTIONS[1]


class DemoFailed(PolyclipError):
    """The service did not do what the demo asked of it; the message says what."""

    code = "demo_failed"


def run(data: Path, port: int, check: bool) -> int:
    """The whole demo; with `check`, in a fresh data folder that is removed again, and 1 if a goal is missed."""
    started = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C: the service ends with the demo
        signal.signal(number, signal.default_int_handler)
    data.mkdir(parents=True, exist_ok=True)
    worlds: dict[str, list[tuple[Path, list[str]]]] = {}
    with tempfile.TemporaryDirectory(dir=data, prefix="check-") as scratch:
        home = Path(scratch) if check else data / "service"
        state = load_state(home)
        with service(home, 0 if check else port, state["root_key"]) as url, httpx.Client(base_url=url, timeout=60) as http:
            tenant_keys(http, home, state)
            for c in COLLECTIONS:
                worlds[c.name] = draw_world(data / "worlds", c)
                upload_all(http, state, c, worlds[c.name])
                if c is COLLECTIONS[0]:
                    first = ask(http, state, c, worlds[c.name][0][1][0])
                    console.print(f"first answered query after [bold]{time.monotonic() - started:.0f} s[/]: {show_hit(first)}")
                    if not check:
                        console.print(f"search while the rest is made: [bold]{page_url(url, state)}[/]", soft_wrap=True)
                        examples = " · ".join(f'"{captions[0]}"' for _, captions in worlds[c.name][:3])
                        console.print(f"for example, in {c.name}: {examples}", markup=False)
                        console.print(f"or a part of a scene in words of your own: {own_words(c)}", markup=False)
            zero_shot = {c.name: answers(http, state, c, worlds[c.name]) for c in COLLECTIONS}
            result = train(http, state)
            learned = answers(http, state, TRAINED, worlds[TRAINED.name])
            passed = report(http, state, worlds, zero_shot, learned, result)
            console.print(f"all done after {time.monotonic() - started:.0f} s")
            if not check:
                console.print(f"\nopen [bold]{page_url(url, state)}[/]  (Ctrl-C ends the service)", soft_wrap=True)
                wait_for_interrupt()
    return 0 if passed or not check else 1


def own_words(c: Collection) -> str:
    """Some phrases that each are true of a clip."""
    rng = np.random.default_rng(c.seed)
    phrases = (draw_phrase(scene, rng, facts=3) for scene in scenes(c.name, 4, c.seed))
    return " · ".join(f'"{phrase.text}"' for phrase in phrases)


def draw_world(folder: Path, c: Collection) -> list[tuple[Path, list[str]]]:
    """The clips of a world with their captions; clips that are there already are kept."""
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task(f"drawing {c.name}", total=c.clips)
        captions = write_world(folder / c.name, c.name, c.clips, c.seed, lambda _: progress.advance(bar))
    rows = [json.loads(line) for line in captions.read_text("utf-8").split("\n") if line]
    return [(captions.parent / row["file"], row["captions"]) for row in rows]


def load_state(home: Path) -> dict[str, Any]:
    """The demo's keys, made at its first run."""
    path = home / "demo-keys.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    home.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"root_key": f"demo-{secrets.token_urlsafe(24)}", "keys": {}}
    save_state(home, state)
    return state


def save_state(home: Path, state: dict[str, Any]) -> None:
    descriptor = os.open(home / "demo-keys.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(state, file)


@contextmanager
def service(home: Path, port: int, root_key: str) -> Iterator[str]:
    """A real `polyclip serve`, ready, for the length of the block; its log is `service.log` in `home`."""
    log = home / "service.log"
    environment = {**os.environ, "POLYCLIP_ROOT_KEY": root_key, "POLYCLIP_BACKBONE": "builtin", "COLUMNS": "200"}
    command = [sys.executable, "-m", "service.cli", "serve", "--data", str(home), "--port", str(port)]
    with log.open("wb") as out:  # in a group of its own: Ctrl-C in a terminal is for the demo, which tells the service
        child = subprocess.Popen(command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, process_group=0)
    try:
        deadline = time.monotonic() + 120
        while True:
            url = next((word for word in log.read_text().split() if word.startswith("http://")), None)
            if url is not None and is_ready(url):
                break
            if child.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text().strip().splitlines()[-1:] or ["no output"]
                raise DemoFailed(f"the service did not start: {tail[0]}")
            time.sleep(0.2)
        yield url
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=15)
        except subprocess.TimeoutExpired:
            child.kill()


def is_ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/readyz", timeout=5).json()["status"] == "ready")
    except httpx.HTTPError:
        return False


def call(http: httpx.Client, key: str, method: str, path: str, **options: Any) -> Any:
    """The answer's JSON. Raises DemoFailed with the problem's detail."""
    response = http.request(method, path, headers={"X-API-Key": key}, **options)
    if response.is_error:
        raise DemoFailed(f"{method} {path}: {response.status_code} {response.json().get('detail', response.text)}")
    return response.json() if response.content else None


def tenant_keys(http: httpx.Client, home: Path, state: dict[str, Any]) -> None:
    """Makes each tenant with an admin key, and each collection, unless an earlier run did."""
    for c in COLLECTIONS:
        if c.tenant not in state["keys"]:
            call(http, state["root_key"], "POST", "/admin/tenants", json={"name": c.tenant})
            made = call(http, state["root_key"], "POST", f"/admin/tenants/{c.tenant}/keys", json={"role": "admin"})
            state["keys"][c.tenant] = made["key"]
            save_state(home, state)
        there = call(http, state["keys"][c.tenant], "GET", "/collections?page_limit=50")
        if c.name not in [row["name"] for row in there["data"]]:
            call(http, state["keys"][c.tenant], "POST", "/collections", json={"name": c.name})


def upload_all(http: httpx.Client, state: dict[str, Any], c: Collection, clips: list[tuple[Path, list[str]]]) -> None:
    """Uploads every clip with its captions and waits until all are ready."""
    key, path = state["keys"][c.tenant], f"/collections/{c.name}"

    def upload(row: tuple[Path, list[str]]) -> None:
        clip, captions = row
        with clip.open("rb") as file:
            form = {"captions": json.dumps(captions), "metadata": json.dumps({"world": c.name})}
            call(http, key, "POST", f"{path}/videos", files={"file": (clip.name, file, "video/mp4")}, data=form)

    with Progress(*COLUMNS, console=console) as progress, ThreadPoolExecutor(4) as pool:
        bar = progress.add_task(f"uploading {c.tenant}/{c.name}", total=c.clips)
        for _ in pool.map(upload, clips):
            progress.advance(bar)
        bar = progress.add_task(f"indexing {c.tenant}/{c.name}", total=c.clips)
        while True:
            counts = call(http, key, "GET", path)["videos"]
            if counts.get("failed"):
                raise DemoFailed(f"{counts['failed']} clips of {c.name} failed to be indexed")
            progress.update(bar, completed=counts.get("ready", 0))
            if counts.get("ready", 0) == counts["total"]:
                return
            time.sleep(0.5)


def ask(http: httpx.Client, state: dict[str, Any], c: Collection, text: str) -> dict[str, Any]:
    return call(http, state["keys"][c.tenant], "POST", "/search", json={"collection": c.name, "text": text, "page_limit": 10})  # type: ignore[no-any-return]


def show_hit(answer: dict[str, Any]) -> str:
    hit = answer["data"][0]
    return f"{hit['filename']}, score {hit['score']:.3f}, {answer['timings_ms']['total']:.1f} ms"


def answers(
    http: httpx.Client, state: dict[str, Any], c: Collection, clips: list[tuple[Path, list[str]]]
) -> dict[str, list[str]]:
    """For each clip's file name, the file names found for its first caption, best first, among the whole collection."""
    found = {}
    with Progress(*COLUMNS, console=console, transient=True) as progress:
        for clip, captions in progress.track(clips, description=f"asking {c.name}"):
            found[clip.name] = [hit["filename"] for hit in ask(http, state, c, captions[0])["data"]]
    return found


def train(http: httpx.Client, state: dict[str, Any]) -> dict[str, Any]:
    """Trains and activates an adapter through the admin endpoint; an adapter of an earlier run is kept."""
    key, name = state["keys"][TRAINED.tenant], TRAINED.name
    there = call(http, key, "GET", f"/collections/{name}/adapters")["data"]
    active = [adapter for adapter in there if adapter["active"]]
    if active:
        console.print(f"the adapter of {name} is there already")
        return {"adapter_id": active[0]["id"], "metrics": active[0]["metrics"], "activated": True}
    task = call(http, key, "POST", f"/admin/collections/{name}/adapters", json={"recipe": RECIPE})["task_id"]
    title = TextColumn(f"training an adapter for {name}")
    with Progress(title, BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=1.0)
        while True:
            state_now = call(http, key, "GET", f"/tasks/{task}")
            progress.update(bar, completed=state_now["progress"], description=state_now["message"])
            if state_now["status"] == "succeeded":
                return state_now["result"]  # type: ignore[no-any-return]
            if state_now["status"] in ("failed", "cancelled"):
                raise DemoFailed(f"training {state_now['status']}: {(state_now['error'] or {}).get('detail')}")
            time.sleep(0.5)


def report(
    http: httpx.Client,
    state: dict[str, Any],
    worlds: dict[str, list[tuple[Path, list[str]]]],
    zero_shot: dict[str, dict[str, list[str]]],
    learned: dict[str, list[str]],
    result: dict[str, Any],
) -> bool:
    """Prints what was found before and after; true if the demo's goals are met."""
    key = state["keys"][TRAINED.tenant]
    manifest = call(http, key, "GET", f"/collections/{TRAINED.name}/adapters/{result['adapter_id']}")["manifest"]
    held_out = held_out_files(http, key, manifest)
    table = Table("collection", "queries", "gallery", "adapter", "R@1", "R@5", title="text → video through POST /search")
    for c in COLLECTIONS:
        table.add_row(f"{c.tenant}/{c.name}", "all", str(c.clips), "none", *recalls(zero_shot[c.name]))
    before = {name: hits for name, hits in zero_shot[TRAINED.name].items() if name in held_out}
    after = {name: hits for name, hits in learned.items() if name in held_out}
    where = f"{TRAINED.tenant}/{TRAINED.name}"
    queries, gallery = f"{len(held_out)} held out", str(TRAINED.clips)
    table.add_row(where, queries, gallery, "none", *recalls(before))
    table.add_row(where, queries, gallery, f"{manifest['parameters']:,} parameters", *recalls(after))
    console.print(table)
    example = next((n for n in sorted(held_out) if after[n][:1] == [n] and before[n][:1] != [n]), sorted(held_out)[0])
    text = next(captions[0] for clip, captions in worlds[TRAINED.name] if clip.name == example)
    console.print(f'"{text}" ({example})', markup=False)
    console.print(f"  without the adapter: {', '.join(before[example][:3])}", markup=False)
    console.print(f"  with it:             {', '.join(after[example][:3])}", markup=False)
    validation = {side: result["metrics"][side]["text_to_video"]["R@1"] for side in ("before", "after")}
    gain = validation["after"] - validation["before"]
    base = recall_at(zero_shot["daylight"], 1)
    console.print(
        f"validation R@1 among the held-out videos alone: {validation['before']:.1f} → {validation['after']:.1f} "
        f"({gain:+.1f}, goal +{GAIN:.0f}); base world top-1 right: {base:.1f} % (goal {BASE_RIGHT:.0f} %)"
    )
    passed = bool(result["activated"]) and gain >= GAIN and base >= BASE_RIGHT
    console.print("[green]the demo does what it should[/]" if passed else "[red]the demo misses a goal[/]")
    return passed


def held_out_files(http: httpx.Client, key: str, manifest: dict[str, Any]) -> set[str]:
    """File names of the videos that the adapter was not trained on."""
    ids = set(manifest["data"]["validation_videos"])
    names, token = set(), None
    while True:
        query = {"page_limit": 50, **({"page_token": token} if token else {})}
        page = call(http, key, "GET", f"/collections/{TRAINED.name}/videos", params=query)
        names |= {row["filename"] for row in page["data"] if row["id"] in ids}
        if (token := page["page_info"]["next_page_token"]) is None:
            return names


def recall_at(found: dict[str, list[str]], k: int) -> float:
    return 100 * sum(name in hits[:k] for name, hits in found.items()) / len(found)


def recalls(found: dict[str, list[str]]) -> tuple[str, str]:
    return f"{recall_at(found, 1):.1f}", f"{recall_at(found, 5):.1f}"


def page_url(url: str, state: dict[str, Any]) -> str:
    return f"{url}/#key={state['keys'][TRAINED.tenant]}"


def wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("bye")
