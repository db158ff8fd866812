"""kill -9 at bad moments: whatever was acknowledged is there, once, after the next start."""

import os
import signal
from pathlib import Path

from serving import Server, alive, clip, new_tenant, wait_for


def test_the_worker_dies_while_videos_are_indexed(tmp_path: Path) -> None:
    server = Server(tmp_path / "data").start()
    try:
        tenant = new_tenant(server.client)
        collection = tenant.collection()
        videos = [tenant.upload(collection, clip(100 + i)).json()["video_id"] for i in range(12)]
        worker = server.worker()
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        assert set(tenant.search(collection)) >= {"data"}, "the API answers while the worker is dead"
        wait_for("another worker", lambda: server.worker() not in (None, worker))
        tenant.all_ready(collection, videos)
        assert sorted(tenant.found(collection)) == sorted(videos)
    finally:
        server.stop()


def test_the_whole_service_dies_right_after_202(tmp_path: Path) -> None:
    server = Server(tmp_path / "data").start()
    tenant = new_tenant(server.client)
    collection = tenant.collection()
    videos = [tenant.upload(collection, clip(120 + i)).json()["video_id"] for i in range(8)]
    children = list(server.processes())
    server.kill()
    wait_for("the end of its children", lambda: not any(alive(pid) for pid in children))
    server.start()
    try:
        again = type(tenant)(server.client, tenant.name, tenant.keys)
        again.all_ready(collection, videos)
        assert sorted(again.found(collection)) == sorted(videos)
    finally:
        server.stop()


def test_the_worker_dies_in_mid_training_and_the_next_one_goes_on(tmp_path: Path) -> None:
    server = Server(tmp_path / "data").start()
    try:
        tenant = new_tenant(server.client)
        collection, _ = tenant.filled(range(150, 162), captions=True)
        recipe = {"steps": 150, "batch_size": 4, "frames": 1, "rank": 2, "shared": 0, "evaluations": 10}
        answer = tenant.post(f"/admin/collections/{collection}/adapters", {"recipe": recipe, "activate": "always"})
        scratch = tmp_path / "data" / "scratch"
        wait_for("a checkpoint", lambda: list(scratch.glob("train-*/checkpoint.safetensors")))
        worker = server.worker()
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        result = tenant.done(answer)
        assert "training_resumed" in server.log
        assert result["activated"]
        assert not list(scratch.glob("train-*")), "nothing of it is left in the scratch folder"
    finally:
        server.stop()


def test_a_row_without_a_job_is_found_by_the_sweep(tmp_path: Path) -> None:
    """A crash between the row and the queue: the next start of a worker finds the task that no queue knows."""
    from service import catalog
    from service.blobs import video_key
    from service.runtime import Runtime
    from service.settings import Settings

    server = Server(tmp_path / "data").start()
    tenant = new_tenant(server.client)
    collection = tenant.collection()
    server.stop()
    runtime = Runtime(Settings(data=tmp_path / "data"))
    with runtime.database.write() as connection:
        owner = catalog.tenant_named(connection, tenant.name)
        found = catalog.collection_named(connection, owner.id, collection)
        runtime.blobs.put(video_key(found.id, "vid_orphan"), clip(140))
        catalog.add_video(connection, owner.id, found.id, "vid_orphan", "a.mp4", "0", 1, {}, [])
    runtime.close()
    server.start()
    try:
        again = type(tenant)(server.client, tenant.name, tenant.keys)
        again.all_ready(collection, ["vid_orphan"])
        assert again.found(collection) == ["vid_orphan"]
    finally:
        server.stop()


def test_sigterm_ends_everything_within_ten_seconds(tmp_path: Path) -> None:
    server = Server(tmp_path / "data").start()
    children = list(server.processes())
    server.process.terminate()
    assert server.process.wait(timeout=10) == 0
    server.client.close()
    wait_for("the end of its children", lambda: not any(alive(pid) for pid in children), 5)
