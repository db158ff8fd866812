"""What users say of hits: kept once, counted by majority, handed to trainings, gone with its video; and the check-up."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_cleanup import tables_naming
from workshop import Workshop

from service.adapters import train
from service.feedback import check_up
from service.feedback.feedback_rows import Verdict
from service.http import feedback as routes
from training.dataset import load_dataset


def say(
    workshop: Workshop, collection: str, video: str, query: str, relevant: bool = False, role: str = "search", **more: Any
) -> Any:
    body = {"collection": collection, "query": query, "video_id": video, "relevant": relevant, **more}
    return workshop.guest.post("/feedback", body, role=role)


def test_a_statement_is_kept_once_and_a_later_one_replaces_it(workshop: Workshop) -> None:
    guest = workshop.guest
    collection, (video, gone) = workshop.filled([1, 2])
    path = f"/collections/{collection}/feedback"
    first = say(workshop, collection, video, "a red  ball ")
    assert first.status_code == 201 and first.json()["query"] == "a red ball" and first.json()["relevant"] is False
    assert say(workshop, collection, video, "a red ball").json()["id"] == first.json()["id"]
    again = say(workshop, collection, video, "a red ball", True).json()
    assert (again["id"], again["relevant"]) == (first.json()["id"], True) and again["updated_at"] > again["created_at"]
    part = say(workshop, collection, video, "a red ball", start=0, end=0.5).json()
    other = say(workshop, collection, gone, "a red ball", role="write").json()
    assert [row["id"] for row in guest.get(path, role="write").json()["data"]] == [other["id"], part["id"], again["id"]]
    page = guest.get(path, relevant=False, page_limit=1).json()
    assert ([row["id"] for row in page["data"]], page["page_info"]["total_results"]) == ([other["id"]], 2)
    assert guest.get(path, role="search").status_code == 403
    assert [guest.call("DELETE", f"{path}/{part['id']}", role="write").status_code for _ in range(2)] == [204, 404]
    guest.call("DELETE", f"/collections/{collection}/videos/{gone}")
    assert [row["id"] for row in guest.get(path).json()["data"]] == [again["id"]], "with its video"
    refused = say(workshop, collection, gone, "a red ball")
    assert (refused.status_code, refused.json()["code"]) == (404, "video_not_found")


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"query": " \n"}, "empty_text"),
        ({"query": "x" * 10_001}, "invalid_request"),
        ({"start": 2, "end": 1}, "invalid_request"),
        ({"relevant": None}, "invalid_request"),
        ({"stars": 5}, "invalid_request"),
    ],
)
def test_what_says_nothing_is_refused(workshop: Workshop, more: dict[str, Any], code: str) -> None:
    answer = say(workshop, workshop.guest.collection(), "vid_nothing", **{"query": "a", **more})
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_a_collection_keeps_so_much_and_takes_all_of_it_along(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    collection, (video, second) = workshop.filled([1, 2])
    monkeypatch.setitem(workshop.storage.settings.__dict__, "feedback", 2)
    body = {"collection": collection, "query": "only here a dirigible", "video_id": video, "relevant": True}
    kept = [workshop.guest.post("/feedback", body, headers={"Idempotency-Key": "said"}).json() for _ in range(2)]
    assert kept[0] == kept[1] and say(workshop, collection, second, "a dirigible").status_code == 201
    full = say(workshop, collection, second, "one more")
    assert (full.status_code, full.json()["code"]) == (409, "too_much_feedback")
    assert say(workshop, collection, second, "a dirigible", True).status_code == 201, "it was said before"
    assert {"feedback", "idempotency"} <= tables_naming(workshop.storage, "dirigible")
    workshop.guest.call("DELETE", f"/collections/{collection}/videos/{video}")
    workshop.work()
    assert tables_naming(workshop.storage, "only here") == set() and "feedback" in tables_naming(workshop.storage, second)
    workshop.guest.call("DELETE", f"/collections/{collection}")
    workshop.work()
    assert tables_naming(workshop.storage, "dirigible") == set()


def test_a_training_gets_what_most_say_as_it_was_when_it_started(workshop: Workshop, tmp_path: Path) -> None:
    collection, (captioned, bare) = workshop.filled([1, 2])
    workshop.guest.call("PUT", f"/collections/{collection}/videos/{captioned}/captions", json={"captions": ["a plain picture"]})
    for role in ("search", "write", "admin"):
        say(workshop, collection, captioned, "sunset", role == "admin", role)
        say(workshop, collection, bare, "sunset", role != "admin", role, start=0.0, end=0.5)
    say(workshop, collection, captioned, "undecided", True)
    say(workshop, collection, captioned, "undecided", False, "write")
    key = workshop.id(collection)
    said = train._feedback(workshop.storage, workshop.tenant, key, tmp_path / "feedback.json")
    assert set(said) == {Verdict(captioned, "sunset", None, None, False), Verdict(bare, "sunset", 0.0, 0.5, True)}
    say(workshop, collection, captioned, "later", True)
    assert train._feedback(workshop.storage, workshop.tenant, key, tmp_path / "feedback.json") == said, "goes on as it began"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "check_captions", lambda *_: None)  # ten videos would be needed
        path = train._write_dataset(workshop.storage, workshop.tenant, key, tmp_path / "dataset.jsonl", said)
        silent = train._write_dataset(workshop.storage, workshop.tenant, key, tmp_path / "silent.jsonl")
    data = load_dataset(path, tmp_path, 8)
    assert [(p.video, p.text) for p in data.pairs] == [(captioned, "a plain picture")]
    assert [(p.video, p.text) for p in data.clicked] == [(bare, "sunset")]
    assert [(p.video, p.text) for p in data.rejected] == [(captioned, "sunset")]
    assert [json.loads(line)["video"] for line in silent.read_text().splitlines()] == [captioned]


def test_a_check_up_tells_what_searches_are_weak_at(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, text = workshop.guest, "a red ball"
    collection, videos = workshop.filled([1, 2, 3], [text])
    path = f"/collections/{collection}/check-up"
    bare = workshop.video(collection, 4)
    order = guest.found(collection, text)
    strong = guest.get(path, role="search").json()
    assert (strong["weak_queries"], strong["never_found"], strong["asked"]) == ([], [], 3), "all are among the first ten"
    assert strong["caption_next"] == [{"video_id": bare, "filename": "clip.mp4", "why": "no_captions"}]
    gate = strong["gate"]
    assert (gate["captioned_videos"], gate["videos_needed"]) == (3, 7)
    assert gate["held_out_captions"] + gate["held_out_needed"] == 30 and gate["captions_needed"] == 5 * gate["held_out_needed"]

    monkeypatch.setattr(check_up, "FIRST", 1)
    monkeypatch.setattr(check_up, "TOGETHER", 2)
    last = order[-1]
    say(workshop, collection, order[0], "what I sought", False)
    say(workshop, collection, order[1], "what I sought", False)
    weak = guest.get(path, role="write").json()
    told = {(query["source"], query["video_id"]): query for query in weak["weak_queries"]}
    users = told.pop(("feedback", None))
    assert (users["reasons"], users["irrelevant"], users["rank"]) == (["called_irrelevant"], 2, None)
    assert {video for _, video in told} == set(videos) - {order[0]}
    assert all(query["rank"] == order.index(video) + 1 for (_, video), query in told.items() if video is not None)
    say(workshop, collection, last, text, True)
    assert "relevant_not_found" in str(guest.get(path).json()["weak_queries"])
    assert order[0] not in [video["video_id"] for video in weak["never_found"]] and weak["never_found_total"] >= 2
    assert weak["caption_next"][0]["video_id"] == bare and {v["why"] for v in weak["caption_next"]} == {
        "no_captions",
        "never_found",
    }
    assert "what I sought" not in guest.get(path, role="search").text, "other users' words"
    empty = guest.get(f"/collections/{guest.collection()}/check-up").json()
    assert (empty["asked"], empty["ready_videos"], empty["gate"]["videos_needed"]) == (0, 0, 10)


def test_a_check_up_ends_in_time_and_holds_up_no_search(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    collection, _ = workshop.filled([1], ["a red ball"])
    monkeypatch.setitem(workshop.storage.settings.__dict__, "search_seconds", 1.0)
    running = threading.Event()

    def endless(*arguments: Any) -> None:
        running.set()
        while True:
            arguments[-1]()
            time.sleep(0.01)

    monkeypatch.setattr(routes, "check_up", endless)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(workshop.guest.get, f"/collections/{collection}/check-up") for _ in range(2)]
        assert running.wait(10) and not any(late.done() for late in waiting)
        assert workshop.guest.get(f"/collections/{collection}").status_code == 200
        for late in waiting:
            assert (late.result().status_code, late.result().json()["code"]) == (503, "overloaded")
