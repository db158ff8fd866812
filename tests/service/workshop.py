"""What a worker does, done in the test's own process: tasks run when the test says so, and can be broken off anywhere."""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from serving import ROOT_KEY, Tenant, clip
from starlette.testclient import TestClient

from adapters_store import pack
from backbone import AdapterShape
from service.adapters.encoder import Encoder
from service.app import create_app
from service.cli import worker
from service.cli.parts import Parts
from service.jobs import task_rows
from service.jobs.run import Runner
from service.jobs.task_rows import Task
from service.settings import Settings
from service.storage import collection_rows, generation_rows, segment_rows, tenant_rows
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.videos import video_rows
from service.videos.decoders import Decoders


def application(data: Path, **settings: Any) -> TestClient:
    """An application without a worker, in this process; what it cannot answer comes back as 500."""
    bounds: dict[str, Any] = {"root_key": ROOT_KEY, "max_video_bytes": 100_000, "threads": 1}
    return TestClient(create_app(Settings(data=data, **{**bounds, **settings})), raise_server_exceptions=False)


@cache
def decoders_of(settings: Settings) -> Decoders:
    """The decoder processes that the tests of an application share; the API has none."""
    made = Decoders(settings)
    atexit.register(made.close)
    return made


def runner(of: Any) -> Runner:
    """What a worker runs tasks with, over the storage and encoder of a Workshop or of an application."""
    return worker.runner(Parts(of.storage, of.encoder, decoders_of(of.storage.settings)))


class Workshop:
    """A tenant of the application in this process, and the hands that do its tasks."""

    def __init__(self, guest: Tenant) -> None:
        self.guest = guest
        services = guest.client.app.state.services
        self.storage: Storage = services.storage
        self.encoder: Encoder = services.encoder
        self.decoders = decoders_of(self.storage.settings)
        with self.storage.database.read() as connection:
            self.tenant = tenant_rows.tenant_named(connection, guest.name).id

    def work(self) -> None:
        """Runs every open task of the tenant, in order."""
        for task in self.open_tasks():
            runner(self).run(self.tenant, task.id)

    def open_tasks(self) -> list[Task]:
        with self.storage.database.read() as connection:
            return [task for task in task_rows.open_tasks(connection) if task.tenant_id == self.tenant]

    def task(self, answer: Any) -> Task:
        """The task that an answer names."""
        with self.storage.database.read() as connection:
            return task_rows.task(connection, self.tenant, answer.json()["task_id"])

    def done(self, answer: Any) -> dict[str, Any]:
        """Runs the task that an answer names; its result."""
        assert answer.status_code == 202, answer.text
        runner(self).run(self.tenant, self.task(answer).id)
        task = self.task(answer)
        assert task.status == "succeeded", task.error
        return dict(task.result or {})

    def filled(self, numbers: Iterable[int], captions: Sequence[str] | None = None, **settings: Any) -> tuple[str, list[str]]:
        """The name of a new collection that holds these clips, ready, and their ids."""
        collection = self.guest.collection(**settings)
        return collection, [self.video(collection, number, captions) for number in numbers]

    def video(self, collection: str, number: int, captions: Sequence[str] | None = None) -> str:
        """A clip, uploaded and indexed."""
        self.done(answer := self.guest.upload(collection, clip(number), captions=captions))
        return str(answer.json()["video_id"])

    def adapter(self, collection: str, seed: int, scope: Any = "both") -> str:
        """A new adapter with random weights."""
        backbone = self.encoder.backbone
        shape = AdapterShape(backbone.dims, rank=2, shared=0, scope=scope)
        tensors = {name: 30 * tensor for name, tensor in shape.initial(seed).items()}
        data = pack(shape, backbone.fingerprint, tensors)
        path = f"/admin/collections/{collection}/adapters/import"
        answer = self.guest.call("POST", path, files={"file": ("a.safetensors", data)})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["adapter_id"])

    def ask(self, collection: str, adapter: str | None) -> Any:
        """The answer to the wish to activate an adapter; nothing runs yet."""
        return self.guest.post(f"/admin/collections/{collection}/activate", {"adapter_id": adapter})

    def activate(self, collection: str, adapter: str | None) -> dict[str, Any]:
        return self.done(self.ask(collection, adapter))

    def id(self, collection: str) -> str:
        return str(self.guest.get(f"/collections/{collection}").json()["id"])

    def generations(self, collection: str) -> list[Generation]:
        """The oldest first."""
        with self.storage.database.read() as connection:
            found = collection_rows.collection_named(connection, self.tenant, collection)
            return generation_rows.generations_of(connection, self.tenant, found.id)

    def states(self, collection: str) -> dict[str | None, str]:
        """State of each generation by its adapter."""
        return {generation.adapter_id: generation.state for generation in self.generations(collection)}

    def held(self, collection: str, adapter: str | None) -> dict[str, list[bytes]]:
        """Frame vectors of each video that the adapter's generation holds."""
        (generation,) = [g for g in self.generations(collection) if g.adapter_id == adapter]
        with self.storage.database.read() as connection:
            videos = video_rows.videos_of(connection, self.tenant, generation.collection_id, "ready")
            return segment_rows.video_vectors(connection, self.tenant, generation.vector_set, [video.id for video in videos])
