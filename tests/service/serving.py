"""A real `polyclip serve` for the tests, tenants that talk to it over HTTP, and small real MP4 files."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from sqlalchemy import create_engine, make_url

ROOT_KEY = "pc_operator_of-the-tests"
ROOT = {"Authorization": f"Bearer {ROOT_KEY}"}
PATIENCE = 240.0  # seconds: for machines that do other work too
_numbers = itertools.count()


def wait_for(what: str, look: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The first true value of `look`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


@lru_cache(maxsize=256)
def clip(number: int = 0, seconds: float = 1.0, size: tuple[int, int] = (96, 64), fps: int = 10) -> bytes:
    """An MP4 file whose picture has the one colour of its number: `colour(number)`. Other numbers give other bytes."""
    memory = BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        container.metadata["comment"] = str(number)  # colours come again after 180
        stream: Any = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        picture = np.empty((size[1], size[0], 3), np.uint8)
        picture[:] = colour(number)
        for _ in range(round(seconds * fps)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return memory.getvalue()


def colour(number: int) -> tuple[int, int, int]:
    return (40 + 53 * number % 180, 40 + 97 * number % 180, 40 + 31 * number % 180)


def broken_clip() -> bytes:
    """Begins like an MP4 file and goes on as noise."""
    noise = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    return b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41" + noise


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant with a key of each role, and the client through which it talks to the service."""

    client: Any
    name: str
    keys: dict[str, str]

    def call(self, method: str, path: str, role: str = "admin", **request: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.keys[role]}", **request.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **request)

    def get(self, path: str, role: str = "admin", **params: Any) -> Any:
        return self.call("GET", path, role, params=params)

    def post(self, path: str, body: Any = None, role: str = "admin", **request: Any) -> Any:
        return self.call("POST", path, role, json=body, **request)

    def collection(self, name: str | None = None, **settings: Any) -> str:
        """The name of a new collection."""
        name = name or f"films-{next(_numbers)}"
        assert self.post("/collections", {"name": name, "settings": settings}).status_code == 201
        return name

    def upload(
        self,
        collection: str,
        data: bytes,
        filename: str = "clip.mp4",
        metadata: Any = None,
        captions: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """The answer to an upload."""
        parts = {"metadata": metadata, "captions": captions}
        fields = {name: part if isinstance(part, str) else json.dumps(part) for name, part in parts.items() if part is not None}
        files = {"file": (filename, data, "video/mp4")}
        return self.call("POST", f"/collections/{collection}/videos", data=fields, files=files, headers=headers or {})

    def filled(self, numbers: Iterable[int], captions: bool = False) -> tuple[str, list[str]]:
        """A new collection that holds these clips, ready; its name and the videos' ids."""
        collection = self.collection()
        videos = []
        for number in numbers:
            texts = [f"colour number {number}", f"a picture of hue {number}"] if captions else None
            answer = self.upload(collection, clip(number), f"clip-{number}.mp4", {"number": number}, texts)
            assert answer.status_code == 202, answer.text
            videos.append(answer.json()["video_id"])
        self.all_ready(collection, videos)
        return collection, videos

    def video(self, collection: str, video: str) -> Any:
        """The video, when it is ready or has failed."""
        look = self.get
        path = f"/collections/{collection}/videos/{video}"
        return wait_for(f"video {video}", lambda: (v := look(path).json())["status"] in ("ready", "failed") and v)

    def all_ready(self, collection: str, videos: Sequence[str]) -> None:
        for video in videos:
            found = self.video(collection, video)
            assert found["status"] == "ready", found["error"]

    def task(self, task: str) -> Any:
        """The task, when it has ended."""
        ended = ("succeeded", "failed", "cancelled")
        return wait_for(f"task {task}", lambda: (t := self.get(f"/tasks/{task}").json())["status"] in ended and t)

    def done(self, answer: Any) -> Any:
        """The result of the task that this answer names; the task must succeed."""
        assert answer.status_code == 202, answer.text
        task = self.task(answer.json()["task_id"])
        assert task["status"] == "succeeded", task["error"]
        return task["result"]

    def search(self, collection: str, text: str = "a red ball", **more: Any) -> Any:
        answer = self.post("/search", {"collection": collection, "text": text, **more}, role="search")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def found(self, collection: str, text: str = "a red ball", **more: Any) -> list[str]:
        """The ids of all videos that a search finds, page after page."""
        ids: list[str] = []
        page = self.search(collection, text, **more)
        while True:
            ids += [hit["video_id"] for hit in page["data"]]
            if (token := page["page_info"]["next_page_token"]) is None:
                return ids
            page = self.search(collection, text, page_token=token, **more)


def new_tenant(client: Any, quotas: dict[str, int] | None = None) -> Tenant:
    name = f"tenant-{os.getpid()}-{next(_numbers)}"
    answer = client.post("/admin/tenants", json={"name": name, "quotas": quotas or {}}, headers=ROOT)
    assert answer.status_code == 201, answer.text
    keys = {
        role: client.post(f"/admin/tenants/{name}/keys", json={"role": role}, headers=ROOT).json()["key"]
        for role in ("search", "write", "admin")
    }
    return Tenant(client, name, keys)


def new_database(postgres: str) -> str:
    """The URL of an empty database of that server."""
    name = f"polyclip_{next(_numbers)}"
    engine = create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return make_url(postgres).set(database=name).render_as_string(hide_password=False)


class Server:
    """`polyclip serve` on a data folder, with its worker."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self._log = data.with_suffix(".log")

    def start(self) -> Server:
        environment = {**os.environ, "POLYCLIP_ROOT_KEY": ROOT_KEY, "POLYCLIP_THREADS": "1"}
        command = [sys.executable, "-m", "service.cli", "serve", "--data", str(self.data), "--port", "0"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        address = wait_for("the address", self._address)
        self.client = httpx.Client(base_url=address, timeout=60)
        wait_for("readiness", self._ready)
        return self

    @property
    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> dict[int, str]:
        """Every process below this one, by id, with its command line."""
        return _descendants(self.process.pid)

    def worker(self) -> int | None:
        """The process id of the embedded worker, None while there is none."""
        return next((pid for pid, command in self.processes().items() if "service.cli.worker" in command), None)

    def files_of(self, *ids: str) -> list[str]:
        """The stored files that are some video's; `rglob` would stumble over a folder that is being removed."""
        files = (f"{folder}/{name}" for folder, _, names in os.walk(self.data / "blobs") for name in names)
        return [file for file in files if any(each in file for each in ids)]

    def kill(self) -> None:
        """SIGKILL to the server's own process, and to nothing else."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.client.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        self.client.close()

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.log
        words = [word for word in self.log.split() if word.startswith("http://")]
        return words[0] if words else None

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return bool(self.client.get("/readyz").json()["status"] == "ready")
        except httpx.TransportError:
            return False


def alive(pid: int) -> bool:
    """Whether the process runs; one that has died and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _descendants(root: int) -> dict[int, str]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, str] = {}
    waiting = list(children.get(root, ()))
    while waiting:
        pid = waiting.pop()
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        waiting += children.get(pid, ())
    return found
