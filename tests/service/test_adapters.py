"""An adapter's way: trained from captions, published, activated by a switch, taken back, moved to another collection."""

import sqlite3
from typing import Any

import pytest
import safetensors.torch
from serving import Server, Tenant, clip, wait_for

from adapters_store import pack
from backbone import AdapterShape, TowerDims
from service.adapters.train import verdict

RECIPE = {"steps": 4, "batch_size": 8, "frames": 2, "evaluations": 1, "learning_rate": 0.05}


def scores(tenant: Tenant, collection: str) -> list[tuple[str, float]]:
    return [(hit["video_id"], hit["score"]) for hit in tenant.search(collection, page_limit=50)["data"]]


Trained = tuple[Tenant, str, dict[str, Any], list[tuple[str, float]]]


@pytest.fixture(scope="module")
def trained(server: Server) -> Trained:
    """A tenant, its collection, the result of its training, and what a search found before."""
    from serving import new_tenant

    tenant = new_tenant(server.client)
    collection, _ = tenant.filled(range(40, 52), captions=True)
    before = scores(tenant, collection)
    body = {"recipe": RECIPE, "activate": "always"}
    return tenant, collection, tenant.done(tenant.post(f"/admin/collections/{collection}/adapters", body)), before


def test_a_trained_adapter_answers_the_searches(trained: Trained) -> None:
    tenant, collection, result, before = trained
    assert result["activated"] is True and result["adapter_id"].startswith("adp_")
    assert {"R@1", "R@5", "R@10", "MdR", "MnR"} <= set(result["metrics"]["before"]["text_to_video"])
    assert set(result["metrics"]) == {"before", "after", "gain", "rank_gain"}
    pool = tenant.search(collection)["search_pool"]
    assert pool["adapter"] == result["adapter_id"] and pool["generation"] == result["generation_id"]
    assert pool["total_videos"] == 12
    assert scores(tenant, collection) != before


def test_its_manifest_says_where_it_came_from(trained: Trained) -> None:
    tenant, collection, result, _ = trained
    listed = tenant.get(f"/collections/{collection}/adapters").json()["data"]
    assert [(a["version"], a["active"]) for a in listed if a["id"] == result["adapter_id"]] == [(1, True)]
    manifest = tenant.get(f"/collections/{collection}/adapters/{result['adapter_id']}").json()["manifest"]
    assert manifest["recipe"]["steps"] == 4 and manifest["parameters"] == 55_584 + 128 * manifest["vocabulary"]
    assert manifest["vocabulary"] > 0 and manifest["words"], "the words that were learned, as words"
    assert manifest["metrics"]["loss"] and len(manifest["metrics"]["curve"]) == 2
    assert manifest["data"]["train_videos"] + len(manifest["data"]["validation_videos"]) == 12


def test_back_to_the_frozen_backbone_and_forth_again(trained: Trained) -> None:
    tenant, collection, result, before = trained
    after = scores(tenant, collection)
    path = f"/admin/collections/{collection}/activate"
    assert tenant.done(tenant.post(path, {"adapter_id": None}))["activated"]
    assert tenant.search(collection)["search_pool"]["adapter"] is None
    assert scores(tenant, collection) == before
    late = tenant.upload(collection, clip(59)).json()["video_id"]
    tenant.all_ready(collection, [late])
    tenant.done(tenant.post(path, {"adapter_id": result["adapter_id"]}))
    assert late in tenant.found(collection), "a video that came while the generation was retired"
    assert [row for row in scores(tenant, collection) if row[0] != late] == after
    tenant.call("DELETE", f"/collections/{collection}/videos/{late}")


def test_the_next_adapter_is_set_against_the_one_in_use_and_never_means_published_alone(trained: Trained) -> None:
    tenant, collection, first, _ = trained
    tenant.done(tenant.post(f"/admin/collections/{collection}/activate", {"adapter_id": first["adapter_id"]}))
    body = {"recipe": {**RECIPE, "seed": 7}, "activate": "never"}
    result = tenant.done(tenant.post(f"/admin/collections/{collection}/adapters", body))
    assert result["metrics"]["in_use"]["digest"] == first["digest"]
    assert result["metrics"]["in_use"]["text_to_video"] == first["metrics"]["after"]["text_to_video"], "same videos"
    assert result["activated"] is False and result["reason"]
    assert tenant.search(collection)["search_pool"]["adapter"] == first["adapter_id"]
    assert tenant.get(f"/collections/{collection}/adapters").json()["page_info"]["total_results"] == 2


@pytest.mark.parametrize(
    ("wanted", "after", "in_use", "surely", "activated"),
    [
        ("if_better", 40.0, None, 0.1, True),
        ("if_better", 40.0, None, 0.0, True),
        ("if_better", 40.0, None, -0.1, False),
        ("if_better", 20.0, None, 0.1, True),
        ("if_better", 19.9, None, 0.1, False),
        ("if_better", 40.0, 50.0, 0.1, False),
        ("if_better", 50.0, 50.0, 0.1, True),
        ("always", 0.0, 50.0, -0.1, True),
        ("never", 90.0, 50.0, 0.1, False),
    ],
)
def test_the_gate(wanted: str, after: float, in_use: float | None, surely: float, activated: bool) -> None:
    metrics = {name: {"text_to_video": {"R@1": value}} for name, value in (("before", 20.0), ("after", after))}
    if in_use is not None:
        metrics["in_use"] = {"text_to_video": {"R@1": in_use}}
    gains = {"gain": {"mean": 1.0, "low": -2.0, "high": 4.0}, "rank_gain": {"mean": 0.5, "low": surely, "high": 0.9}}
    decided, reason = verdict({**metrics, **gains}, wanted)
    assert decided is activated
    assert wanted != "if_better" or ("-2 to +4" in reason and f"{after:g}" in reason and f"{surely:+g} to +0.9" in reason)


def test_weights_move_to_another_collection_and_give_the_same_scores(trained: Trained) -> None:
    tenant, collection, result, _ = trained
    weights = tenant.get(f"/collections/{collection}/adapters/{result['adapter_id']}/weights").content
    assert "vt_adapter_up_share_weight" in safetensors.torch.load(weights)
    other, _ = tenant.filled(range(40, 52))
    path = f"/admin/collections/{other}/adapters/import"
    imported = tenant.done(tenant.call("POST", path, files={"file": ("a.safetensors", weights)}))["adapter_id"]
    tenant.done(tenant.post(f"/admin/collections/{other}/activate", {"adapter_id": imported}))
    assert [s for _, s in scores(tenant, other)] == pytest.approx([s for _, s in scores(tenant, collection)], abs=1e-3)


def test_foreign_files_are_no_adapters(trained: Trained) -> None:
    tenant, collection, _, _ = trained
    path = f"/admin/collections/{collection}/adapters/import"
    garbage = tenant.call("POST", path, files={"file": ("a.safetensors", b"garbage" * 100)})
    assert (garbage.status_code, garbage.json()["code"]) == (422, "invalid_adapter")
    shape = AdapterShape(TowerDims(192, 6, 128, 4), 2, 0)
    foreign = tenant.call("POST", path, files={"file": ("a.safetensors", pack(shape, "0" * 64, shape.initial(0)))})
    assert (foreign.status_code, foreign.json()["code"]) == (422, "adapter_mismatch")


def test_an_evaluation_gives_recall_both_ways(trained: Trained) -> None:
    tenant, collection, _, _ = trained
    result = tenant.done(tenant.post(f"/admin/collections/{collection}/evaluate", {"split": "all"}))
    assert result["text_to_video"]["gallery"] == 12 and result["text_to_video"]["queries"] == 24
    assert 0 <= result["video_to_text"]["R@1"] <= 100


def test_too_few_captions_and_bad_recipes_are_refused_at_once(tenant: Tenant) -> None:
    collection, _ = tenant.filled([1], captions=True)
    path = f"/admin/collections/{collection}/adapters"
    assert tenant.post(path).json()["code"] == "too_few_captions"
    assert tenant.post(path, {"recipe": {"rnak": 2}}).json()["code"] == "invalid_recipe"
    assert tenant.post(path, {"activate": "maybe"}).json()["code"] == "invalid_request"
    assert tenant.post(path, role="write").json()["code"] == "role_too_low"


def test_a_text_adapter_shares_the_video_vectors_and_can_come_before_the_whole_one(server: Server, tenant: Tenant) -> None:
    collection, videos = tenant.filled(range(40, 52), captions=True)
    before = scores(tenant, collection)
    path = f"/admin/collections/{collection}/adapters"
    assert tenant.post(path, {"scope": "vision", "text_first": True}).json()["code"] == "invalid_recipe"
    whole = tenant.done(tenant.post(path, {"recipe": RECIPE, "activate": "always", "text_first": True}))
    first = whole["text_first"]
    assert (first["activated"], first["embedded"]) == (True, 0)
    assert (whole["activated"], whole["embedded"]) == (True, 12)
    assert whole["metrics"]["in_use"]["digest"] == first["digest"], "it says what it brings beyond the first"
    listed = {row["id"]: row["scope"] for row in tenant.get(f"/collections/{collection}/adapters").json()["data"]}
    assert listed == {first["adapter_id"]: "text", whole["adapter_id"]: "both"}
    tenant.done(tenant.post(f"/admin/collections/{collection}/activate", {"adapter_id": first["adapter_id"]}))
    assert scores(tenant, collection) != before
    with sqlite3.connect(server.data / "polyclip.sqlite") as database:
        marks = ",".join("?" * len(videos))
        rows = database.execute(f"select count(*) from segments where video_id in ({marks})", videos).fetchone()[0]
    database.close()
    assert rows == 24, "of the frozen backbone, which the first searches too, and of the second"
    late = tenant.upload(collection, clip(58)).json()["video_id"]
    tenant.all_ready(collection, [late])
    assert late in tenant.found(collection)


def test_a_training_can_be_cancelled(trained: Trained) -> None:
    tenant, collection, _, _ = trained

    def state() -> tuple[Any, Any]:
        adapters = tenant.get(f"/collections/{collection}/adapters").json()["data"]
        return adapters, tenant.search(collection)["search_pool"]["adapter"]

    before = state()
    recipe = {**RECIPE, "steps": 100_000}
    task = tenant.post(f"/admin/collections/{collection}/adapters", {"recipe": recipe}).json()["task_id"]
    assert tenant.post(f"/tasks/{task}/cancel").status_code == 200
    assert tenant.task(task)["status"] == "cancelled"
    assert state() == before


def test_deleting_the_collection_ends_its_training_and_leaves_nothing_of_it(server: Server, tenant: Tenant) -> None:
    collection, videos = tenant.filled(range(40, 52), captions=True)
    recipe = {**RECIPE, "steps": 100_000}
    task = tenant.post(f"/admin/collections/{collection}/adapters", {"recipe": recipe}).json()["task_id"]
    scratch = server.data / "scratch" / f"train-{task}"
    wait_for("the training", lambda: scratch.exists() and (tenant.get(f"/tasks/{task}").json()["progress"] or None))
    assert tenant.call("DELETE", f"/collections/{collection}").status_code == 204
    wait_for("the end of the training", lambda: not scratch.exists())
    wait_for("the purge", lambda: not server.files_of(*videos))
    wait_for("the end of its tasks", lambda: tenant.get(f"/tasks/{task}").status_code == 404)
    assert {t["kind"] for t in tenant.get("/tasks").json()["data"]} == {"purge"}


def test_searches_go_on_during_a_switch_and_each_names_one_pair(trained: Trained) -> None:
    tenant, collection, result, _ = trained
    path = f"/admin/collections/{collection}/activate"
    pools = set()
    for adapter in (None, result["adapter_id"]):
        task = tenant.post(path, {"adapter_id": adapter}).json()["task_id"]
        while tenant.get(f"/tasks/{task}").json()["status"] in ("queued", "running"):
            answer = tenant.search(collection)
            assert len(answer["data"]) == 10
            pools.add((answer["search_pool"]["generation"], answer["search_pool"]["adapter"]))
    assert len(pools) == len({generation for generation, _ in pools}), "a generation has one adapter"
