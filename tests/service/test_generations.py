"""Generations: built beside the active one, switched to in one step, taken back; whatever happens meanwhile."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from serving import clip
from workshop import Workshop, runner

import adapters_store
from backbone import AdapterShape
from service.adapters import activate as generations
from service.adapters.publish import publish
from service.jobs import task_rows
from service.jobs.kinds import Cancelled
from service.storage import generation_rows
from service.storage.blobs import frames_key, video_key
from service.storage.rows import NotFound
from service.upkeep import delete
from service.videos import index, video_rows
from training.progress import Progress


class Meanwhile:
    """A spread that does something else after its first chunk, once."""

    def __init__(self, workshop: Workshop, does: Callable[[], Any]) -> None:
        self.workshop, self.does, self.chunks = workshop, does, 0

    def __call__(self, generation: generation_rows.Generation, chunks: Sequence[Sequence[str]], progress: Any) -> None:
        done = 0
        for chunk in chunks:
            generations.fill_chunk(
                self.workshop.storage, self.workshop.encoder, self.workshop.decoders, self.workshop.tenant, generation.id, chunk
            )
            done += len(chunk)
            self.chunks += 1
            if self.chunks == 1:
                self.does()
            progress(Progress("embedding", done, len(chunks)))


def activate(workshop: Workshop, collection: str, adapter: str | None, does: Callable[[], Any], **more: Any) -> Any:
    """An activation during which something happens."""
    progress = more.pop("progress", lambda *_: None)
    where = (workshop.storage, workshop.encoder, workshop.decoders, workshop.tenant, workshop.id(collection))
    return generations.activate(*where, adapter, progress, Meanwhile(workshop, does), **more)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "CHUNK", 2)


def test_a_switch_embeds_what_is_missing_and_nothing_else(workshop: Workshop) -> None:
    collection, videos = workshop.filled(range(3))
    adapter = workshop.adapter(collection, 1)
    assert workshop.activate(collection, adapter)["embedded"] == 3
    assert workshop.activate(collection, None)["embedded"] == 0, "its generation still stands"
    late = workshop.video(collection, 3)
    listed = workshop.guest.get(f"/collections/{collection}/generations", role="search").json()
    assert [(g["adapter_id"], g["state"], g["videos"], g["missing"]) for g in listed["data"]] == [
        (adapter, "retired", 3, 1),
        (None, "active", 4, 0),
    ]
    assert listed["data"][0]["retired_at"] and listed["data"][1]["retired_at"] is None
    assert workshop.activate(collection, adapter)["embedded"] == 1
    assert set(workshop.held(collection, adapter)) == {*videos, late}
    assert workshop.states(collection) == {None: "retired", adapter: "active"}


def test_vectors_of_a_build_are_those_that_an_upload_gets(workshop: Workshop) -> None:
    """Read and embedded in parallel, mixed with other videos: the same vectors."""
    collection, videos = workshop.filled(range(4))
    adapter = workshop.adapter(collection, 1)
    workshop.activate(collection, adapter)
    built = workshop.held(collection, adapter)
    other, _ = workshop.filled([])
    workshop.activate(other, same := workshop.adapter(other, 1))
    for number, video in enumerate(videos):
        twin = workshop.video(other, number)
        (uploaded,) = workshop.held(other, same)[twin]
        one, two = (np.frombuffer(v, np.float16).astype(np.float32) for v in (built[video][0], uploaded))
        np.testing.assert_allclose(one, two, atol=2e-3)
    assert built != workshop.held(collection, None)


def test_what_arrives_changes_or_goes_during_a_build_is_right_in_both(workshop: Workshop) -> None:
    collection, videos = workshop.filled(range(5))
    adapter = workshop.adapter(collection, 1)
    late: list[str] = []

    def meanwhile() -> None:
        late.append(workshop.video(collection, 5))
        path = f"/collections/{collection}/videos"
        for gone in (videos[0], videos[4]):  # one that has been embedded, one that has not
            assert workshop.guest.call("DELETE", f"{path}/{gone}").status_code == 204
        texts = {"captions": [{"text": "another caption"}]}
        assert workshop.guest.call("PUT", f"{path}/{videos[1]}/captions", json=texts).status_code == 200
        assert set(workshop.guest.found(collection)) == {*videos[1:4], *late}, "searches go on"
        assert workshop.guest.search(collection)["search_pool"]["adapter"] is None

    activate(workshop, collection, adapter, meanwhile)
    assert set(workshop.held(collection, adapter)) == set(workshop.held(collection, None)) == {*videos[1:4], *late}
    assert set(workshop.guest.found(collection)) == {*videos[1:4], *late}
    video = workshop.guest.get(f"/collections/{collection}/videos/{videos[1]}").json()
    assert [caption["text"] for caption in video["captions"]] == ["another caption"]


def test_a_video_that_becomes_ready_without_the_new_vectors_is_found_by_the_next_round(workshop: Workshop) -> None:
    """Ready in the moment before the generation was set to building: nothing but the look of the switch can see it."""
    collection, _ = workshop.filled(range(3))
    adapter = workshop.adapter(collection, 1)

    def meanwhile() -> None:
        late = workshop.video(collection, 4)
        with workshop.storage.database.write() as connection:
            (made,) = [g for g in workshop.generations(collection) if g.adapter_id == adapter]
            connection.exec_driver_sql(f"delete from segments where vector_set = '{made.id}' and video_id = '{late}'")

    assert activate(workshop, collection, adapter, meanwhile).embedded == 4
    assert len(workshop.held(collection, adapter)) == 4


def test_of_two_activations_at_once_the_one_asked_for_later_counts(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))
    one, two = (workshop.adapter(collection, seed) for seed in (1, 2))
    first, second = workshop.ask(collection, one), workshop.ask(collection, two)
    assert workshop.done(second)["activated"]
    result = workshop.done(first)
    assert not result["activated"] and workshop.task(second).id in result["reason"]
    assert workshop.states(collection) == {None: "retired", two: "active"}


def test_an_activation_that_is_overtaken_in_the_middle_gives_way(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))
    one, two = (workshop.adapter(collection, seed) for seed in (1, 2))
    asked = workshop.task(workshop.ask(collection, one)).created_at
    with pytest.raises(generations.Superseded):
        activate(workshop, collection, one, lambda: workshop.activate(collection, two), asked=asked)
    assert workshop.states(collection) == {None: "retired", one: "retired", two: "active"}


def test_two_activations_of_one_adapter_both_succeed(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(4))
    adapter = workshop.adapter(collection, 1)
    answers = [workshop.ask(collection, adapter) for _ in range(2)]
    threads = [threading.Thread(target=workshop.done, args=[answer]) for answer in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(workshop.task(a).result or {}).get("activated") for a in answers] == [True, True]
    assert workshop.states(collection) == {None: "retired", adapter: "active"}


def test_a_cancelled_build_is_retired_and_keeps_what_it_has(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(5))
    adapter = workshop.adapter(collection, 1)

    def progress(now: Progress) -> None:
        if now.done:
            raise Cancelled

    with pytest.raises(Cancelled):
        activate(workshop, collection, adapter, lambda: None, progress=progress)
    assert workshop.states(collection) == {None: "active", adapter: "retired"}
    assert len(workshop.held(collection, adapter)) == 2
    assert workshop.activate(collection, adapter)["embedded"] == 3


def test_one_of_two_builders_is_cancelled_and_the_other_goes_on(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))
    adapter = workshop.adapter(collection, 1)

    def cancel() -> None:
        (made,) = [g for g in workshop.generations(collection) if g.adapter_id == adapter]
        with workshop.storage.database.write() as connection:
            generation_rows.set_generation_state(connection, workshop.tenant, made.id, "retired")
            connection.exec_driver_sql("update generations set retired_at = '2000-01-01T00:00:00Z' where id = ?", (made.id,))
        delete.retain(workshop.storage)  # and retention takes it away under the other's hands

    activate(workshop, collection, adapter, cancel)
    assert workshop.states(collection) == {None: "retired", adapter: "active"}
    assert len(workshop.held(collection, adapter)) == 3


def test_a_collection_deleted_during_a_build(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))
    adapter, key = workshop.adapter(collection, 1), workshop.id(collection)
    with pytest.raises(NotFound, match="collection"):
        activate(workshop, collection, adapter, lambda: workshop.guest.call("DELETE", f"/collections/{collection}"))
    with workshop.storage.database.read() as connection:
        assert {g.state for g in generation_rows.generations_of(connection, workshop.tenant, key)} == {"active", "retired"}
    workshop.work()
    with workshop.storage.database.read() as connection:
        assert generation_rows.generations_of(connection, workshop.tenant, key) == []


def test_an_adapter_deleted_during_its_build(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))
    adapter = workshop.adapter(collection, 1)
    path = f"/collections/{collection}/adapters/{adapter}"

    def delete() -> None:
        assert workshop.guest.call("DELETE", path).status_code == 204
        workshop.work()

    with pytest.raises(NotFound, match="adapter"):
        activate(workshop, collection, adapter, delete)
    assert workshop.states(collection) == {None: "active"}
    task = workshop.ask(collection, adapter)
    assert (task.status_code, task.json()["code"]) == (404, "adapter_not_found")


def test_an_adapter_deleted_while_its_activation_waits(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    adapter = workshop.adapter(collection, 1)
    waiting = workshop.ask(collection, adapter)
    workshop.guest.call("DELETE", f"/collections/{collection}/adapters/{adapter}")
    assert workshop.task(waiting).status == "cancelled"


def test_what_goes_while_it_is_embedded_is_not_written(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video, and then the generation itself, between the forward pass and the transaction that stores its vectors."""
    collection, videos = workshop.filled(range(2))
    adapter = workshop.adapter(collection, 1)
    where = (workshop.storage, workshop.tenant, workshop.id(collection))
    generation, _ = generations._round(*where, adapter, None)
    embed = index.embedded_segments

    def then_delete(*arguments: Any) -> Any:
        rows = embed(*arguments)
        workshop.guest.call("DELETE", f"/collections/{collection}/videos/{videos[0]}")
        return rows

    def then_remove(*arguments: Any) -> Any:
        rows = embed(*arguments)
        with workshop.storage.database.write() as connection:
            generation_rows.set_generation_state(connection, workshop.tenant, generation.id, "retired")
            assert generation_rows.remove_generation(connection, workshop.tenant, generation.id)
        return rows

    def rows() -> int:
        with workshop.storage.database.read() as connection:
            query = "select count(*) from segments where ordinal >= 0 and vector_set = ?"
            return int(connection.exec_driver_sql(query, (generation.id,)).scalar() or 0)

    monkeypatch.setattr(index, "embedded_segments", then_delete)
    assert (
        generations.fill_chunk(
            workshop.storage, workshop.encoder, workshop.decoders, workshop.tenant, generation.id, videos[:1]
        )
        == []
        and rows() == 0
    )
    monkeypatch.setattr(index, "embedded_segments", then_remove)
    assert (
        generations.fill_chunk(
            workshop.storage, workshop.encoder, workshop.decoders, workshop.tenant, generation.id, videos[1:]
        )
        == []
        and rows() == 0
    )


def test_a_generation_left_building_by_a_crash(workshop: Workshop) -> None:
    """With its task open the next start goes on; without one the sweep retires it."""
    collection, _ = workshop.filled(range(3))
    adapter = workshop.adapter(collection, 1)
    answer = workshop.ask(collection, adapter)
    generation, missing = generations._round(workshop.storage, workshop.tenant, workshop.id(collection), adapter, None)
    generations.fill_chunk(
        workshop.storage, workshop.encoder, workshop.decoders, workshop.tenant, generation.id, missing[:1]
    )  # and here the worker dies
    delete.sweep(workshop.storage)
    assert workshop.states(collection)[adapter] == "building", "its task will come for it"
    assert workshop.done(answer)["embedded"] == 2
    other = workshop.adapter(collection, 2)
    generations._round(workshop.storage, workshop.tenant, workshop.id(collection), other, None)
    delete.sweep(workshop.storage)
    assert workshop.states(collection) == {None: "retired", adapter: "active", other: "retired"}


def test_frames_that_cannot_be_read_fail_one_video_and_not_the_build(workshop: Workshop) -> None:
    collection, videos = workshop.filled(range(3))
    for video in videos[:2]:
        workshop.storage.blobs.put(frames_key(workshop.id(collection), video), b"no zip")
    workshop.storage.blobs.delete(video_key(workshop.id(collection), videos[1]))  # the other one is decoded again
    adapter = workshop.adapter(collection, 1)
    assert workshop.activate(collection, adapter)["activated"]
    broken = workshop.guest.get(f"/collections/{collection}/videos/{videos[1]}").json()
    assert (broken["status"], broken["error"]["code"]) == ("failed", "frames_damaged")
    assert set(workshop.held(collection, adapter)) == {videos[0], videos[2]}


def test_a_text_adapter_builds_nothing_and_shares_the_frozen_vectors(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))
    both, text = workshop.adapter(collection, 1), workshop.adapter(collection, 2, "text")
    workshop.activate(collection, both)
    assert workshop.activate(collection, text)["embedded"] == 0, "the frozen backbone's vectors still stand"
    frozen, _, sharing = workshop.generations(collection)
    assert sharing.vector_set == frozen.id
    late = workshop.video(collection, 3)
    assert late in workshop.held(collection, None), "shared: kept up to date with the text adapter's"
    assert workshop.activate(collection, None)["embedded"] == 0


def test_frozen_vectors_that_are_gone_are_built_anew_for_a_text_adapter(workshop: Workshop) -> None:
    collection, videos = workshop.filled(range(3))
    before = workshop.held(collection, None)
    both, text = workshop.adapter(collection, 1), workshop.adapter(collection, 2, "text")
    workshop.activate(collection, both)
    frozen = workshop.generations(collection)[0]
    assert delete.remove_generation(workshop.storage, frozen)
    assert workshop.activate(collection, text)["embedded"] == 3
    assert workshop.states(collection) == {both: "retired", None: "retired", text: "active"}
    again = workshop.held(collection, None)
    for video in videos:
        one, two = (np.frombuffer(v[video][0], np.float16).astype(np.float32) for v in (before, again))
        np.testing.assert_allclose(one, two, atol=2e-3)
    shared = next(g for g in workshop.generations(collection) if g.adapter_id is None)
    assert shared.state == "retired" and not delete.remove_generation(workshop.storage, shared), "another searches its vectors"


def trained(workshop: Workshop, collection: str, rival: str | None, activate: str) -> Any:
    """A training task that died right after its version was published: R@1 10 with what was in use, 20 with the adapter."""
    shape = AdapterShape(workshop.encoder.backbone.dims, rank=2, shared=0)
    fingerprint = workshop.encoder.backbone.fingerprint
    data = adapters_store.pack(shape, fingerprint, {n: 30 * t for n, t in shape.initial(99).items()})
    recall = {name: {"text_to_video": {"R@1": value}} for name, value in (("before", 10.0), ("after", 20.0))}
    in_use = {"in_use": {"digest": rival, **recall["before"]}} if rival else {}
    metrics = {**recall, **in_use, **{name: {"mean": 10.0, "low": 5.0, "high": 15.0} for name in ("gain", "rank_gain")}}
    manifest = adapters_store.describe(data, metrics=metrics)
    version = publish(workshop.storage, workshop.encoder, workshop.tenant, workshop.id(collection), data, manifest)
    with workshop.storage.database.write() as connection:
        request = {"recipe": {}, "activate": activate}
        task = task_rows.add_task(connection, workshop.tenant, workshop.id(collection), "train_adapter", request)
        task_rows.start_task(connection, workshop.tenant, task.id)
        made = {"adapter_id": version.id, "trained_at": version.created_at}
        task_rows.set_task(connection, workshop.tenant, task.id, result=made)
    return task


def test_a_training_that_died_while_its_generation_was_built_does_not_train_again(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(3))  # without captions: it could not
    task = trained(workshop, collection, None, "if_better")
    runner(workshop).run(workshop.tenant, task.id)
    ended = workshop.guest.get(f"/tasks/{task.id}").json()
    assert ended["status"] == "succeeded" and ended["result"]["activated"], ended
    assert "20" in ended["result"]["reason"] and ended["result"]["embedded"] == 3
    assert workshop.states(collection)[ended["result"]["adapter_id"]] == "active"


def test_an_adapter_is_not_activated_over_one_that_it_was_not_compared_with(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    task = trained(workshop, collection, None, "if_better")
    workshop.activate(collection, workshop.adapter(collection, 1))
    runner(workshop).run(workshop.tenant, task.id)
    result = workshop.guest.get(f"/tasks/{task.id}").json()["result"]
    assert not result["activated"] and "compared" in result["reason"]


def test_a_switch_by_hand_that_comes_after_the_verdict_counts(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1])
    task = trained(workshop, collection, None, "always")
    workshop.activate(collection, None)
    runner(workshop).run(workshop.tenant, task.id)
    result = workshop.guest.get(f"/tasks/{task.id}").json()["result"]
    assert not result["activated"] and "later" in result["reason"]
    assert workshop.guest.search(collection)["search_pool"]["adapter"] is None


def test_an_upload_into_a_collection_under_deletion_is_refused(workshop: Workshop) -> None:
    collection, _ = workshop.filled([])
    key = workshop.id(collection)
    workshop.guest.call("DELETE", f"/collections/{collection}")
    with pytest.raises(NotFound), workshop.storage.database.write() as connection:
        video_rows.add_video(connection, workshop.tenant, key, "vid_late", "a.mp4", "0", 1, {}, [])


def test_a_decoded_video_whose_collection_went_leaves_no_file(workshop: Workshop) -> None:
    collection = workshop.guest.collection()
    answer = workshop.guest.upload(collection, clip(1)).json()
    key, blobs = workshop.id(collection), workshop.storage.blobs
    decode = workshop.decoders.decode

    def slow(*arguments: Any) -> Any:
        decoded = decode(*arguments)
        workshop.guest.call("DELETE", f"/collections/{collection}")
        workshop.work()
        return decoded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workshop.decoders, "decode", slow)
        index.index_video(workshop.storage, workshop.encoder, workshop.decoders, workshop.tenant, answer["video_id"])
    assert not [k for kind in delete.KINDS for k in blobs.keys(f"{kind}/{key}/")]


def test_an_activation_that_was_asked_for_before_a_training_ended_does_not_undo_its_switch(workshop: Workshop) -> None:
    """As when its worker died, and it is tried again only now."""
    collection, _ = workshop.filled([1])
    by_hand = workshop.ask(collection, workshop.adapter(collection, 1))
    task = trained(workshop, collection, None, "always")
    runner(workshop).run(workshop.tenant, task.id)
    made = workshop.guest.get(f"/tasks/{task.id}").json()["result"]
    result = workshop.done(by_hand)
    assert made["activated"] and not result["activated"] and task.id in result["reason"]
    assert workshop.guest.search(collection)["search_pool"]["adapter"] == made["adapter_id"]
