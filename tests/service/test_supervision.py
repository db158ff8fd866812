"""Processes that die, hang or are told to end: the worker and its keeper, the trainer, the drain, a killed command."""

import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from house import House
from serving import ROOT_KEY, Server, Tenant, alive, clip, new_tenant, wait_for
from structlog.testing import capture_logs
from workshop import runner

from adapters_store import pack
from backbone import AdapterShape, load_backbone
from service.adapters import trainer
from service.cli import local
from service.cli.parts import Parts
from service.jobs import supervisor, task_rows
from service.jobs.queue import Jobs, sweep
from service.jobs.supervisor import Supervisor
from service.jobs.task_rows import Task
from training.recipe import InvalidRecipe

ENDLESS = {"steps": 100_000, "batch_size": 8, "frames": 2, "evaluations": 1}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in the place of the Python that runs the children of this process; before, there is none."""
    path = tmp_path / "program"

    def make(script: str) -> None:
        part = path.with_suffix(".part")
        part.write_text(f"#!/bin/sh\n{script}\n")
        part.chmod(0o755)
        part.replace(path)

    monkeypatch.setattr(sys, "executable", str(path))
    return make


def test_a_data_folder_is_its_owners_alone_and_the_root_key_is_in_no_other_process(server: Server, tenant: Tenant) -> None:
    collection, [video] = tenant.filled([1])
    assert tenant.video(collection, video)["system_metadata"]["decoder"] == "pyav"
    modes: dict[str, int] = {}
    for folder, _, names in os.walk(server.data):
        for path in (folder, *(os.path.join(folder, name) for name in names)):
            with suppress(FileNotFoundError):  # a purge goes on
                modes[path] = os.stat(path).st_mode & 0o777
    children = server.processes()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    assert len(modes) > 10 and not {path: oct(mode) for path, mode in modes.items() if mode & 0o077}
    assert any("indexer.sandbox" in command for command in children.values())
    assert not [children[pid] for pid, told in environments.items() if ROOT_KEY.encode() in told]


def test_a_data_folder_of_before_is_shut_off_when_it_is_next_opened(house: House) -> None:
    data, database = house.storage.settings.data, house.storage.settings.data / "polyclip.sqlite"
    data.chmod(0o755)
    database.chmod(0o644)
    Parts.over(house.storage.settings).close()
    assert (data.stat().st_mode & 0o777, database.stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_worker_of_its_own_forgets_the_root_key(tmp_path: Path) -> None:
    environment = {**os.environ, "POLYCLIP_ROOT_KEY": ROOT_KEY, "POLYCLIP_DATA": str(tmp_path / "data")}
    worker = subprocess.Popen([sys.executable, "-m", "service.cli", "worker"], env=environment, stderr=subprocess.PIPE)
    try:
        wait_for("the worker", lambda: (tmp_path / "data" / "worker.lock").exists())
        assert ROOT_KEY.encode() not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    finally:
        worker.kill()
        worker.communicate()


# --- the worker and its keeper


def test_the_waits_grow_from_death_to_death_and_begin_anew_after_a_long_life(
    program: Callable[[str], None], house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF", (0.1, 0.2, 0.3))
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 1.0)
    keeper = Supervisor(house.storage.settings, "service.cli.worker")
    with capture_logs() as deaths:
        keeper.start()  # there is no program: the process cannot even be made
        wait_for("two deaths", lambda: len(deaths) >= 2)
        program("exit 3")
        wait_for("deaths of a child", lambda: [d["status"] for d in deaths].count(3) >= 2)
        program("sleep 1.5; exit 7")
        wait_for("the end of a long life", lambda: deaths[-1]["status"] == 7)
        keeper.stop()
    young = [d["restart_in_seconds"] for d in takewhile(lambda d: d["status"] != 7, deaths)]
    assert young == [0.1, 0.2, *[0.3] * (len(young) - 2)] and deaths[-1]["restart_in_seconds"] == 0.1


@pytest.mark.parametrize("when", ["lives", "is being started"])
def test_a_worker_that_does_not_end_is_killed(
    program: Callable[[str], None], house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.5)
    keeper, known, popen = Supervisor(house.storage.settings, "service.cli.worker"), threading.Event(), subprocess.Popen

    def make(*arguments: Any, **more: Any) -> Any:
        child = popen(*arguments, **more)
        if when == "is being started":  # it runs already, and its keeper is told to stop before it has it in hand
            wait_for("the order to stop", keeper._stopping.is_set)
        known.set()
        return child

    monkeypatch.setattr(subprocess, "Popen", make)
    program(f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done")
    keeper.start()
    pid = int(wait_for("its life", lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert when == "is being started" or known.wait(60)
    keeper.stop()
    wait_for("its death", lambda: not alive(pid))


@pytest.mark.slow
def test_the_api_answers_while_its_worker_dies_again_and_again_and_then_jobs_go_on(server: Server, tenant: Tenant) -> None:
    collection, videos = tenant.filled([60])
    over = threading.Event()

    def search() -> int:
        count = 0
        while not over.is_set():
            assert videos[0] in tenant.found(collection)
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        searches = pool.submit(search)
        try:
            uploads = [tenant.upload(collection, clip(61 + i, seconds=5.0)).json()["video_id"] for i in range(4)]
            for _ in range(3):
                pid = wait_for("a worker", server.worker)
                assert os.getpgid(pid) == pid, "Ctrl-C reaches the API alone"
                os.kill(pid, signal.SIGKILL)
                wait_for("its death", lambda pid=pid: server.worker() != pid)  # type: ignore[misc]
            tenant.all_ready(collection, uploads)
        finally:
            over.set()
        assert searches.result() > 3
    waits = [json.loads(line)["restart_in_seconds"] for line in server.log.splitlines() if "worker_died" in line]
    assert waits[-3] < waits[-2] < waits[-1]


# --- a training without memory


@pytest.mark.slow
def test_a_training_that_runs_out_of_memory_fails_and_nothing_else(server: Server, tenant: Tenant) -> None:
    collection, videos = tenant.filled(range(40, 52), captions=True)
    backbone = load_backbone()
    shape = AdapterShape(backbone.dims, rank=2, shared=0)
    path = f"/admin/collections/{collection}"
    data = pack(shape, backbone.fingerprint, shape.initial(1))
    adapter = tenant.call("POST", f"{path}/adapters/import", files={"file": ("a.safetensors", data)}).json()["adapter_id"]
    tenant.done(tenant.post(f"{path}/activate", {"adapter_id": adapter}))
    worker = server.worker()
    task = tenant.post(f"{path}/adapters", {"recipe": ENDLESS, "activate": "always"}).json()["task_id"]
    wait_for("a step", lambda: tenant.get(f"/tasks/{task}").json()["progress"])
    (trainer,) = [pid for pid, command in server.processes().items() if "-m training" in command and task in command]
    resource.prlimit(trainer, resource.RLIMIT_DATA, (1 << 20, 1 << 20))
    other = tenant.upload(collection, clip(70)).json()["video_id"]
    ended = tenant.task(task)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "training_out_of_memory"), ended["error"]
    assert ended["error"]["detail"].startswith("the training ran out of memory")
    tenant.all_ready(collection, [other])
    assert sorted(tenant.found(collection)) == sorted([*videos, other])
    assert tenant.search(collection)["search_pool"]["adapter"] == adapter
    assert server.worker() == worker


@pytest.mark.parametrize(
    ("script", "killed", "code", "words"),
    [
        ("echo no such library >&2; exit 3", 0, "training_crashed", "status 3. no such library"),
        ("echo MemoryError >&2; exit 1", 0, "training_out_of_memory", "MemoryError"),
        ("echo '{error}'; exit 1", 0, "training_out_of_memory", "could not create a primitive"),
        ("kill -9 $$", 0, "training_crashed", "status -9"),
        ("kill -9 $$", 1, "training_out_of_memory", "the system killed it"),
    ],
)
def test_how_a_training_process_ended_is_told(
    house: House,
    program: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    killed: int,
    code: str,
    words: str,
) -> None:
    """`killed`: how many processes the kernel kills meanwhile for want of memory."""
    counts = iter([7, 7 + killed])
    monkeypatch.setattr(trainer, "_killed_for_memory", lambda: next(counts))
    error = {"event": "error", "code": "internal", "detail": "could not create a primitive"}
    program(script.format(error=json.dumps(error)))
    films = house.collection("films")
    with house.storage.database.write() as connection:
        request = {"recipe": ENDLESS, "activate": "never"}
        task = task_rows.add_task(connection, house.tenant.id, films.id, "train_adapter", request)
    assert runner(house).run(house.tenant.id, task.id) is None
    ended = state(house, task)
    assert ended.status == "failed" and ended.error is not None
    assert ended.error["code"] == code and words in ended.error["detail"]
    assert code != "training_out_of_memory" or "a smaller `micro_batch`" in ended.error["detail"]


# --- the end by a signal


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may end."""
    running = Server(tmp_path / "data").start()
    yield running
    running.kill()


@contextmanager
def half_sent(tenant: Tenant, path: str, **content: Any) -> Iterator[Callable[[], tuple[int, Any]]]:
    """A request sent up to the middle of its body, which the application has begun to read; the function that is handed out
    sends the rest and gives the status and the body of the answer."""
    headers = {"Authorization": f"Bearer {tenant.keys['admin']}", "Expect": "100-continue"}
    request = tenant.client.build_request("POST", path, headers=headers, **content)
    body = request.read()
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    with socket.create_connection((request.url.host, request.url.port), timeout=60) as connection:
        connection.sendall("\r\n".join(lines).encode())
        assert b" 100 " in connection.recv(100)
        connection.sendall(body[: len(body) // 2])

        def answer() -> tuple[int, Any]:
            connection.sendall(body[len(body) // 2 :])
            with closing(http.client.HTTPResponse(connection)) as response:
                response.begin()
                return response.status, json.loads(response.read())

        yield answer


def takes_no_connections(server: Server) -> bool:
    url = server.client.base_url
    with suppress(ConnectionRefusedError), socket.create_connection((url.host, url.port), timeout=60):
        return False
    return True


@pytest.mark.slow
def test_sigterm_ends_the_service_in_order_and_a_second_one_at_once(own: Server) -> None:
    tenant = new_tenant(own.client)
    collection, _ = tenant.filled(range(40, 52), captions=True)
    training = tenant.post(f"/admin/collections/{collection}/adapters", {"recipe": ENDLESS}).json()["task_id"]
    wait_for("a step", lambda: tenant.get(f"/tasks/{training}").json()["progress"])
    children = own.processes()
    key = {"Authorization": f"Bearer {tenant.keys['admin']}"}
    uploads = f"/collections/{collection}/videos"
    with (
        tenant.client.stream("GET", f"/tasks/{training}/events", headers=key) as stream,
        half_sent(tenant, uploads, files={"file": ("late.mp4", clip(80))}) as upload,
        half_sent(tenant, "/search", json={"collection": collection, "text": "a red ball"}) as search,
    ):
        events = stream.iter_lines()
        assert any(line.startswith("data: ") for line in events)
        own.process.terminate()
        wait_for("the closed port", lambda: takes_no_connections(own))
        list(events)  # ends by itself, and whole: httpx would raise an error
        (status, found), (accepted, late) = search(), upload()
    assert status == 200 and found["data"]
    assert accepted == 202
    assert own.process.wait(timeout=10) == 0
    wait_for("the end of all others", lambda: not any(alive(pid) for pid in children))

    own.client.close()
    tenant = replace(tenant, client=own.start().client)
    tenant.all_ready(collection, [late["video_id"]])
    wait_for("the training", lambda: "training_resumed" in own.log)
    children = own.processes()
    with half_sent(tenant, uploads, files={"file": ("lost.mp4", clip(81))}):
        own.process.terminate()
        wait_for("the closed port", lambda: takes_no_connections(own))
        own.process.terminate()
        assert own.process.wait(timeout=30) != 0
    wait_for("the end of all others", lambda: not any(alive(pid) for pid in children))


@pytest.mark.slow
def test_a_client_may_keep_a_connection_for_as_long_as_httpx_does(server: Server) -> None:
    url = server.client.base_url
    with closing(http.client.HTTPConnection(url.host, url.port, timeout=30)) as connection:
        for pause in (5.5, 0):  # httpx takes a connection that has been idle for 5 s, not for more
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            assert answer.read() and answer.status == 200
            time.sleep(pause)


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_a_worker_that_hangs(own: Server) -> None:
    worker = own.worker()
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)
    own.process.terminate()
    wait_for("the closed port", lambda: takes_no_connections(own))
    time.sleep(2.0)  # the API has ended, its process waits for the worker
    own.process.terminate()
    assert own.process.wait(timeout=30) != 0
    wait_for("the end of the worker", lambda: not alive(worker))


# --- a killed command


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A data folder with a collection, `films`, that an adapter can be trained on."""
    with House(tmp_path_factory.mktemp("house") / "data") as made:
        films = made.add_collection("films")
        for number in range(40, 52):
            made.add_video(films, number)
        yield made


def state(house: House, task: Task) -> Task:
    with house.storage.database.read() as connection:
        return task_rows.task(connection, house.tenant.id, task.id)


def open_tasks(house: House) -> list[Task]:
    with house.storage.database.read() as connection:
        return task_rows.open_tasks(connection)


@pytest.mark.slow
def test_the_sweep_ends_the_training_of_a_command_that_was_killed(house: House) -> None:
    data = house.storage.settings.data
    recipe = ["--recipe", json.dumps(ENDLESS), "--json"]
    command = [sys.executable, "-m", "service.cli", "train", "--collection", "films", "--data", str(data), *recipe]
    engine = Jobs(house.storage.settings)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as training:
        try:
            (task,) = wait_for("its task", lambda: open_tasks(house))
            sweep(house.storage, engine)
            assert state(house, task).status == "running"
        finally:
            training.kill()
    assert state(house, task).status == "running"
    sweep(house.storage, engine)
    engine.close()
    assert (state(house, task).status, (state(house, task).error or {})["code"]) == ("failed", "interrupted")
    assert not list(data.glob("offline-*"))


def test_a_command_that_ends_by_itself_leaves_no_sign_of_life(house: House) -> None:
    settings = house.storage.settings
    with pytest.raises(InvalidRecipe):
        local.train_collection(settings, "default", "films", {"rnak": 1}, "never", None)
    assert not open_tasks(house) and not list(settings.data.glob("offline-*"))
