"""Log lines: whose they are, and how those of libraries look."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Server, Tenant, clip
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.testing import capture_logs

from service.adapters import trainer
from service.adapters.trainer import TrainingFailed
from training.progress import unheard

RECIPE = {"steps": 4, "batch_size": 4, "frames": 2, "evaluations": 2, "rank": 2, "folds": 0}


def lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def test_a_request_is_followed_through_api_job_and_training(server: Server, tenant: Tenant) -> None:
    collection = tenant.collection()

    def upload(number: int) -> str:
        texts = [f"colour number {number}"]
        answer = tenant.upload(collection, clip(number), captions=texts, headers={"X-Request-ID": f"{collection}/{number}"})
        assert answer.headers["X-Request-Id"] == f"{collection}/{number}"
        return str(answer.json()["task_id"])

    with ThreadPoolExecutor(4) as pool:  # at the same time: they must not mix
        asked = {
            task: f"{collection}/{number}" for number, task in zip(range(70, 82), pool.map(upload, range(70, 82)), strict=True)
        }
    for task, request in asked.items():
        assert tenant.task(task)["request_id"] == request
    path = f"/admin/collections/{collection}/adapters"
    answer = tenant.post(path, {"recipe": RECIPE, "activate": "always"}, headers={"X-Request-ID": f"{collection}/train"})
    assert tenant.done(answer)["activated"] is True
    asked[training := answer.json()["task_id"]] = f"{collection}/train"

    told = lines(server.log)
    for task, request in asked.items():
        mine = [line for line in told if line.get("task_id") == task]
        assert {line["request_id"] for line in mine} == {request}
        assert [line for line in told if line.get("request_id") == request] == mine
        events = [line["event"] for line in mine]
        assert events[0] == "task_enqueued" and events[1] == "task_started" and events[-1] == "task_ended"
        assert mine[-1]["status"] == "succeeded"
    of_training = [line["event"] for line in told if line.get("task_id") == training]
    assert "training_process_started" in of_training and "training_validation" in of_training


@pytest.mark.parametrize("asked", ["x" * 129, "two words", 'quo"te', "käse", ""])
def test_an_id_that_is_long_or_unclean_is_made_anew(guest: Tenant, asked: str) -> None:
    answer = guest.call("GET", "/collections/none", headers={"X-Request-ID": asked.encode()})
    assert answer.headers["X-Request-Id"].startswith("req_")
    assert answer.json()["request_id"] == answer.headers["X-Request-Id"]


def test_what_a_training_process_says_is_told_as_its_tasks() -> None:
    said = "import sys; print('a word of the child', file=sys.stderr); sys.exit(3)"
    with (
        bound_contextvars(request_id="chosen", task_id="task_1"),
        capture_logs(processors=[merge_contextvars]) as told,
        pytest.raises(TrainingFailed, match=r"status 3\. a word of the child"),
    ):
        trainer.run([sys.executable, "-c", said], "col", set(), 60, 60, unheard, lambda: False)
    (line,) = [line for line in told if line["event"] == "training_process_says"]
    assert (line["line"], line["request_id"], line["task_id"]) == ("a word of the child", "chosen", "task_1")


def test_lines_of_libraries_look_like_ours_and_bear_the_request() -> None:
    code = """
import logging
import uvicorn
from dbos import DBOS
from structlog.contextvars import bound_contextvars
from service import logs
logs.configure()
uvicorn.Config("", log_config=None, log_level="warning")
with bound_contextvars(request_id="chosen"):
    for name in ("uvicorn.error", "dbos", "indexer.sandbox"):
        try:
            raise ValueError("boom")
        except ValueError:
            logging.getLogger(name).warning("%s of %s", 1, 2, exc_info=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in told] == ["uvicorn.error", "dbos", "indexer.sandbox"]
    for line in told:
        assert (line["event"], line["level"], line["request_id"]) == ("1 of 2", "warning", "chosen")
        assert "boom" in line["exception"] and line["timestamp"]
