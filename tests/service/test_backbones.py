"""A collection's backbone changed while it is searched: vectors built beside the old ones, one switch, the way back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from serving import ROOT, clip, new_tenant, wait_for
from workshop import Workshop, application

import backbone as backbone_package
from adapters_store import pack
from backbone import AdapterShape, load_backbone, rescore, room
from indexer.frames import FrameArchive
from service.adapters import activate as generations
from service.adapters import backbones
from service.adapters.backbones import BackboneChoice, OtherBackbone
from service.cli.parts import Parts
from service.settings import Settings
from service.storage.blobs import frames_key
from service.upkeep import delete

OTHER = {"name": "ViT-S-32-alt", "pretrained": "random"}
THIRD = {"name": "ViT-S-16-alt", "pretrained": "random"}
OWN = {"name": "builtin", "pretrained": None}
TEXT = "a picture of hue 2"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def workshop(data: Path) -> Iterator[Workshop]:
    """An application of its own: what one collection's backbone is bears on all others."""
    with application(data) as client:
        yield Workshop(new_tenant(client))


def wish(workshop: Workshop, collection: str, backbone: dict[str, Any]) -> Any:
    return workshop.guest.post(f"/admin/collections/{collection}/activate", {"backbone": backbone})


def change(workshop: Workshop, collection: str, backbone: dict[str, Any]) -> dict[str, Any]:
    return workshop.done(wish(workshop, collection, backbone))


def search(workshop: Workshop, collection: str, text: str = TEXT) -> tuple[str, dict[str, float]]:
    """The generation that answered, and every video's score."""
    answer = workshop.guest.post("/search", {"collection": collection, "text": text, "page_limit": 50}).json()
    return answer["search_pool"]["generation"], {hit["video_id"]: hit["score"] for hit in answer["data"]}


def expected(workshop: Workshop, generation: str, choice: dict[str, Any], text: str = TEXT) -> dict[str, float]:
    """Every video's score by the vectors of a generation and a backbone that was loaded for this alone."""
    (found,) = [g for c in collections(workshop) for g in workshop.generations(c) if g.id == generation]
    with workshop.storage.database.read() as connection:
        rows = connection.exec_driver_sql(
            "select video_id, frames from segments where vector_set = ? and ordinal >= 0", (found.vector_set,)
        ).all()
    backbone = load_backbone(choice["name"], choice["pretrained"])
    assert found.backbone == backbone.fingerprint
    query = backbone.encode_text(backbone.tokenize([text]).ids)[0].numpy()
    scores = rescore(query, [blob for _, blob in rows])
    return {video: float(score) for (video, _), score in zip(rows, scores, strict=True)}


def collections(workshop: Workshop) -> list[str]:
    return [row["name"] for row in workshop.guest.get("/collections", page_limit=50).json()["data"]]


def states(workshop: Workshop, collection: str) -> list[tuple[str, str]]:
    """(name of the backbone, state) of each generation."""
    with workshop.storage.database.read() as connection:
        return sorted((backbones.described(connection, g.backbone)["name"], g.state) for g in workshop.generations(collection))


def test_a_change_and_the_way_back(workshop: Workshop) -> None:
    collection, videos = workshop.filled(range(3))
    before = search(workshop, collection)
    assert before[1] == pytest.approx(expected(workshop, before[0], OWN), abs=2e-3)
    assert change(workshop, collection, OTHER)["embedded"] == 3
    shown = workshop.guest.get(f"/collections/{collection}").json()
    assert {name: shown["backbone"][name] for name in OTHER} == OTHER
    after = search(workshop, collection)  # the same words, and no vector of the other backbone from the cache of texts
    assert after[0] == shown["active_generation"] != before[0]
    assert after[1] == pytest.approx(expected(workshop, after[0], OTHER), abs=2e-3)
    videos.append(workshop.video(collection, 3))  # comes to the backbone in use alone
    assert set(search(workshop, collection)[1]) == set(videos)
    assert change(workshop, collection, OWN)["embedded"] == 1, "the three from before are there still"
    assert set(search(workshop, collection)[1]) == set(videos)
    assert {v: s for v, s in search(workshop, collection)[1].items() if v in before[1]} == before[1]


def test_an_adapter_brings_its_backbone_back_and_none_stays_on_the_one_in_use(workshop: Workshop) -> None:
    collection, _ = workshop.filled(range(2))
    adapter = workshop.adapter(collection, 1)
    workshop.activate(collection, adapter)
    change(workshop, collection, OTHER)
    assert workshop.activate(collection, None)["embedded"] == 0
    assert workshop.guest.get(f"/collections/{collection}").json()["backbone"]["name"] == OTHER["name"]
    assert workshop.activate(collection, adapter)["embedded"] == 0
    assert workshop.guest.get(f"/collections/{collection}").json()["backbone"]["name"] == "builtin"
    assert workshop.guest.get(f"/collections/{collection}").json()["active_adapter"] == adapter
    late = workshop.adapter(collection, 2)  # published for the backbone it was made for, whichever is in use
    change(workshop, collection, OTHER)
    assert workshop.activate(collection, late)["activated"]


def test_what_else_is_done_with_a_collection_is_done_with_its_backbone(workshop: Workshop) -> None:
    """An evaluation, an adapter for it, embeddings, an archive that comes back with its vectors."""
    collection, _ = workshop.filled(range(2), captions=["a picture of hue 2"])
    change(workshop, collection, OTHER)
    frozen = load_backbone(OTHER["name"], OTHER["pretrained"])
    path = f"/admin/collections/{collection}/evaluate"
    assert workshop.done(workshop.guest.post(path, {"split": "all"}))["text_to_video"]["gallery"] == 2
    answer = workshop.guest.post("/v1/embeddings", {"model": collection, "input": TEXT}).json()
    vector = frozen.encode_text(frozen.tokenize([TEXT]).ids)[0]
    assert answer["data"][0]["embedding"] == pytest.approx((vector / vector.norm()).tolist(), abs=1e-4)
    shape = AdapterShape(frozen.dims, rank=2, shared=0)
    data = pack(shape, frozen.fingerprint, {name: 30 * tensor for name, tensor in shape.initial(1).items()})
    path = f"/admin/collections/{collection}/adapters/import"
    adapter = workshop.guest.call("POST", path, files={"file": ("a.safetensors", data)}).json()["adapter_id"]
    assert workshop.activate(collection, adapter)["embedded"] == 2
    _, scores = search(workshop, collection)
    archive = workshop.guest.get(f"/admin/collections/{collection}/export").content
    sent = {"file": ("c.tar", archive, "application/x-tar")}
    workshop.done(workshop.guest.call("POST", "/admin/collections/import", files=sent, params={"collection": "back"}))
    assert workshop.guest.get("/collections/back").json()["backbone"]["name"] == OTHER["name"]
    assert sorted(search(workshop, "back")[1].values()) == pytest.approx(sorted(scores.values()), abs=1e-5)


def test_a_wish_that_is_sent_again_loads_nothing(workshop: Workshop) -> None:
    """By then another backbone may stand beside the folder's own, and be in use."""
    collection, _ = workshop.filled([1])
    path, headers = f"/admin/collections/{collection}/activate", {"Idempotency-Key": "once"}
    first = workshop.guest.post(path, {"backbone": OTHER}, headers=headers)
    workshop.done(first)
    change(workshop, collection, OWN)
    change(workshop, collection, THIRD)
    assert workshop.guest.post(path, {"backbone": OTHER}, headers=headers).json() == first.json()
    wait_for("what is asked of the loader", lambda: not workshop.encoder._beside._loading)  # type: ignore[union-attr]
    assert [each.choice.name for each in workshop.encoder.resident] == ["builtin", THIRD["name"]]


def test_searches_during_a_change_see_one_backbone_or_the_other(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "CHUNK", 1)
    collection, _ = workshop.filled(range(4))
    own, _ = search(workshop, collection)
    seen: list[tuple[str, dict[str, float]]] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            seen.append(search(workshop, collection))

    asker = threading.Thread(target=ask)
    asker.start()
    change(workshop, collection, OTHER)
    ended.set()
    asker.join()
    seen.append(search(workshop, collection))
    other = seen[-1][0]
    assert {generation for generation, _ in seen} == {own, other}
    right = {own: expected(workshop, own, OWN), other: expected(workshop, other, OTHER)}
    for generation, scores in seen:
        assert scores == pytest.approx(right[generation], abs=2e-3)


def test_what_cannot_be_asked_for(workshop: Workshop, tmp_path: Path) -> None:
    collection, _ = workshop.filled([1])
    (tmp_path / "weights.safetensors").write_bytes(b"")
    for backbone, says in (
        ({"name": "ViT-B-33", "pretrained": "openai"}, "there is no such architecture"),
        ({"name": "ViT-B-32"}, "its weights are openai"),
        ({"name": "ViT-B-32", "pretrained": str(tmp_path / "weights.safetensors")}, "its weights are openai"),
        ({"name": "ViT-B-32", "pretrained": "somebody/repository"}, "its weights are openai"),
        ({"name": "builtin", "pretrained": "/etc/passwd"}, "not offered"),
    ):
        answer = wish(workshop, collection, backbone)
        assert (answer.status_code, answer.json()["code"]) == (422, "backbone_not_offered")
        assert says in answer.json()["detail"]
    path = f"/admin/collections/{collection}/activate"
    for body in ({}, {"adapter_id": "adp_1", "backbone": OTHER}, {"backbone": {**OTHER, "more": 1}}, {"backbone": "builtin"}):
        assert workshop.guest.post(path, body).status_code == 422
    assert workshop.guest.post(path, {"backbone": OTHER}, role="write").status_code == 403
    assert not workshop.open_tasks()


def test_what_fails_changes_nothing(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    collection, _ = workshop.filled([1])
    before = search(workshop, collection)

    def fails(backbone: dict[str, Any]) -> tuple[str, str]:
        answer = wish(workshop, collection, backbone)
        assert answer.status_code == 202
        workshop.work()
        error = workshop.task(answer).error
        assert error is not None
        assert states(workshop, collection) == [("builtin", "active")]
        assert search(workshop, collection) == before
        return error["code"], error["detail"]

    code, detail = fails({"name": "ViT-B-32", "pretrained": "openai"})
    assert code == "backbone_not_found"
    assert "could not be downloaded" in detail
    monkeypatch.setattr(room, "free_memory", lambda: 10_000_000)
    code, detail = fails(OTHER)
    assert code == "unsupported_backbone"
    assert "GB of memory" in detail


def test_a_third_backbone_is_refused_while_two_are_in_use(workshop: Workshop) -> None:
    one, _ = workshop.filled([1])
    two, _ = workshop.filled([2])
    change(workshop, one, OTHER)
    answer = wish(workshop, two, THIRD)
    assert (answer.status_code, answer.json()["code"]) == (409, "too_many_backbones")
    assert change(workshop, two, OTHER)["embedded"] == 1
    change(workshop, one, OWN)
    assert wish(workshop, one, THIRD).status_code == 409, "the other collection is on the second still"
    workshop.guest.call("DELETE", f"/collections/{two}")
    assert change(workshop, one, THIRD)["activated"]
    found = search(workshop, one)
    assert found[1] == pytest.approx(expected(workshop, found[0], THIRD), abs=2e-3)


def test_a_restart_and_what_is_told_of_the_backbones(workshop: Workshop, data: Path) -> None:
    collection, _ = workshop.filled(range(2))
    change(workshop, collection, OTHER)
    before = search(workshop, collection)
    rows = workshop.guest.get("/backbones").json()["data"]
    assert [(row["name"], row["own"], row["in_memory"]) for row in rows[:2]] == [
        ("builtin", True, True), (OTHER["name"], False, True)
    ]  # fmt: skip
    assert {"ViT-B-32", "PE-Core-B-16"} <= {row["name"] for row in rows}
    with application(data) as again:
        told = again.get("/readyz").json()["backbones"]
        assert [each["name"] for each in told] == ["builtin", OTHER["name"]]
        assert "polyclip_backbones 2.0" in again.get("/metrics", headers=ROOT).text
        guest = type(workshop.guest)(again, workshop.guest.name, workshop.guest.keys)
        assert search(Workshop(guest), collection) == before


def test_the_backbone_that_collections_use_can_become_the_folder_s_own(workshop: Workshop, data: Path) -> None:
    collection, _ = workshop.filled([1])
    with pytest.raises(OtherBackbone):
        _ = Parts.over(Settings(data=data, backbone=OTHER["name"], pretrained=OTHER["pretrained"])).encoder.backbone
    change(workshop, collection, OTHER)
    parts = Parts.over(Settings(data=data, backbone=OTHER["name"], pretrained=OTHER["pretrained"]))
    assert parts.encoder.backbone.name == OTHER["name"]
    parts.close()
    parts = Parts.over(Settings(data=data))
    assert parts.encoder.choice == BackboneChoice(**OTHER)
    parts.close()


def test_frames_too_small_for_the_new_backbone_are_made_again_from_the_video(tmp_path: Path) -> None:
    with application(tmp_path / "data", cached_short_side=64, max_video_bytes=1_000_000) as client:
        workshop = Workshop(new_tenant(client))
        collection = workshop.guest.collection()
        workshop.done(answer := workshop.guest.upload(collection, clip(1, size=(320, 240))))
        key = frames_key(workshop.id(collection), answer.json()["video_id"])
        assert FrameArchive(workshop.storage.blobs.get(key)).short_side() == 64
        change(workshop, collection, OTHER)
        assert FrameArchive(workshop.storage.blobs.get(key)).short_side() == 224


def test_the_operator_names_what_may_be_asked_for(tmp_path: Path) -> None:
    with application(tmp_path / "data", backbones=("ViT-S-32-alt:random",)) as client:
        workshop = Workshop(new_tenant(client))
        collection, _ = workshop.filled([1])
        assert wish(workshop, collection, THIRD).json()["code"] == "backbone_not_offered"
        assert [row["name"] for row in workshop.guest.get("/backbones").json()["data"]] == ["builtin", OTHER["name"]]
        change(workshop, collection, OTHER)
        assert change(workshop, collection, OWN)["activated"], "the folder's own needs no leave"


def test_the_vectors_of_a_backbone_left_behind_go_after_a_while(workshop: Workshop) -> None:
    collection, _ = workshop.filled([1], keep_generations=0)
    change(workshop, collection, OTHER)
    delete.retain(workshop.storage, settled=0)
    assert states(workshop, collection) == [(OTHER["name"], "active")]
    workshop.activate(collection, None)
    assert len(search(workshop, collection)[1]) == 1


def test_a_backbone_that_cannot_be_loaded_any_more_stops_its_own_collection_alone(tmp_path: Path, data: Path) -> None:
    weights = tmp_path / "ours.safetensors"
    weights.write_bytes((Path(backbone_package.__file__).parent / "weights" / "builtin.safetensors").read_bytes())
    tensors = load_file(weights)
    save_file({**tensors, "text_projection": tensors["text_projection"].flip(0).contiguous()}, weights)
    ours = {"name": "builtin", "pretrained": str(weights)}
    with application(data, backbones=(f"builtin:{weights}",)) as client:
        workshop = Workshop(new_tenant(client))
        (one, _), (two, _) = workshop.filled([1]), workshop.filled([2])
        change(workshop, one, ours)
        shown = workshop.guest.get(f"/collections/{one}").json()["backbone"]
        assert (shown["name"], shown["pretrained"]) == ("builtin", weights.name), "where it lies is nobody's business"
        assert change(workshop, two, {"name": "builtin", "pretrained": weights.name})["embedded"] == 1
        change(workshop, two, OWN)
        keys = workshop.guest
    weights.write_bytes(b"")
    with application(data) as client:
        guest = type(keys)(client, keys.name, keys.keys)
        for _ in range(3):
            answer = guest.post("/search", {"collection": one, "text": TEXT})
            assert (answer.status_code, answer.json()["code"]) == (503, "backbone_not_found")
        assert len(search(Workshop(guest), two)[1]) == 1
        assert guest.post("/search", {"collection": two, "text": TEXT}).status_code == 200
