"""What an adapter from outside may claim, and what a training over HTTP may ask for."""

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from serving import new_tenant
from workshop import Workshop, runner

import adapters_store
from adapters_store import Fit, InvalidAdapter, pack
from backbone import AdapterShape, TowerDims
from service.adapters import train as learning
from service.adapters.publish import publish
from service.jobs import task_rows
from service.jobs.kinds import TurnOver
from service.jobs.run import TURN_WAITS, Report
from service.jobs.task_rows import Task
from training.progress import Progress


def sent(workshop: Workshop, collection: str, data: bytes) -> Any:
    path = f"/admin/collections/{collection}/adapters/import"
    return workshop.guest.call("POST", path, files={"file": ("a.safetensors", data)})


def adapter(workshop: Workshop, rank: int, dims: TowerDims | None = None, weight: float = 0.0) -> bytes:
    backbone = workshop.encoder.backbone
    shape = AdapterShape(dims or backbone.dims, rank, 0)
    tensors = {name: tensor + (weight if name.endswith("weight") else 0.0) for name, tensor in shape.initial(0).items()}
    return pack(shape, backbone.fingerprint, tensors)


def test_ranks_above_the_stacks_are_refused_unless_a_setting_allows_them(workshop: Workshop) -> None:
    collection, largest = workshop.guest.collection(), workshop.storage.settings.adapter_rank
    refused = sent(workshop, collection, adapter(workshop, largest + 1))
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_adapter")
    assert f"rank {largest + 1}" in refused.json()["detail"]
    assert sent(workshop, collection, adapter(workshop, largest)).status_code == 202
    allowed = workshop.storage.settings.model_copy(update={"adapter_max_rank": largest + 1})
    assert allowed.largest_rank == largest + 1


@pytest.mark.parametrize("weight", [3e38, 1e25])
def test_weights_that_make_searches_empty_are_refused(workshop: Workshop, weight: float) -> None:
    refused = sent(workshop, workshop.guest.collection(), adapter(workshop, 2, weight=weight))
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_adapter")


def test_an_adapter_is_tried_before_it_is_published(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bound of a weight lets it pass, the answers themselves decide."""
    monkeypatch.setattr(adapters_store.artifact, "MAX_WEIGHT", float("inf"))
    collection = workshop.guest.collection()
    refused = sent(workshop, collection, adapter(workshop, 2, weight=1e25))
    assert refused.status_code == 422 and "not finite" in refused.json()["detail"]
    assert workshop.guest.get(f"/collections/{collection}/adapters").json()["data"] == []


def test_an_adapter_that_names_this_backbone_but_has_other_towers_is_refused(workshop: Workshop) -> None:
    dims = workshop.encoder.backbone.dims
    other = TowerDims(dims.visual_width, dims.visual_layers, dims.text_width, dims.text_layers + 1)
    refused = sent(workshop, workshop.guest.collection(), adapter(workshop, 2, other))
    assert (refused.status_code, refused.json()["code"]) == (422, "adapter_mismatch")


@pytest.mark.parametrize("claim", [{"visual_layers": 10**9}, {"rank": 1e400}, {"rank": "2"}, {"text_width": 2.0}])
def test_a_header_that_lies_is_refused(workshop: Workshop, claim: dict[str, Any]) -> None:
    data = adapter(workshop, 2)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = {**json.loads(header["__metadata__"]["adapter"]), **claim}
    lying = safetensors.torch.save(safetensors.torch.load(data), {"adapter": json.dumps(about)})
    refused = sent(workshop, workshop.guest.collection(), lying)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_adapter")
    assert next(iter(claim)) in refused.json()["detail"]


def test_a_checkpoint_whose_tensors_claim_more_than_they_hold_is_refused() -> None:
    """A view of one number may say that it has any shape."""
    dims, rank = TowerDims(64, 2, 32, 2), 1_000_000
    shapes = AdapterShape(dims, rank, 0).layout()
    state = {f"clip.{name}": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    with pytest.raises(InvalidAdapter, match="wider than both towers"):
        adapters_store.from_official(state, dims)


def test_the_published_file_is_one_that_fits(workshop: Workshop) -> None:
    """Whatever way an adapter comes in: the check is in front of the one place that publishes."""
    collection, data = workshop.guest.collection(), adapter(workshop, 40)
    with pytest.raises(InvalidAdapter, match="rank 40"):
        publish(
            workshop.storage, workshop.encoder, workshop.tenant, workshop.id(collection), data, adapters_store.describe(data)
        )
    assert isinstance(workshop.encoder.fit, Fit)


@pytest.mark.parametrize("rank", [17, 256])
def test_a_recipe_over_http_asks_for_no_larger_rank(workshop: Workshop, rank: int) -> None:
    collection, _ = workshop.filled([])
    refused = workshop.guest.post(f"/admin/collections/{collection}/adapters", {"recipe": {"rank": rank}})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_recipe")
    assert f"recipe.rank is {rank}" in refused.json()["detail"]


@pytest.mark.parametrize(
    "recipe", [{"steps": 1_000_000}, {"minimum_steps": 1_000_000}, {"epochs": 1000}, {"batch_size": 4096}], ids=str
)
def test_a_recipe_over_http_keeps_to_the_limits(workshop: Workshop, recipe: dict[str, float]) -> None:
    (name,) = recipe
    refused = workshop.guest.post(f"/admin/collections/{workshop.guest.collection()}/adapters", {"recipe": recipe})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_recipe")
    assert f"recipe.{name}" in refused.json()["detail"]


def test_the_gate_stays_shut_where_there_is_not_enough_evidence() -> None:
    """2 held-out queries, found 1 of 2 and then 2 of 2, are no gain."""
    sides = {name: {"text_to_video": {"R@1": value, "queries": 2}} for name, value in (("before", 50.0), ("after", 100.0))}
    gains = {"gain": {"mean": 50.0, "low": 0.0, "high": 100.0}, "rank_gain": {"mean": 0.3, "low": 0.0, "high": 0.7}}
    metrics = {**sides, **gains}
    activated, reason = learning.verdict({**metrics, "not_enough_evidence": True}, "if_better")
    assert not activated and "not enough evidence: 2 held-out queries" in reason
    assert learning.verdict({**metrics, "not_enough_evidence": True}, "always")[0]
    assert learning.verdict(metrics, "if_better")[0]


def test_a_cross_validation_that_could_not_be_had_is_no_evidence_and_a_version_from_before_is_judged_by_what_it_has() -> None:
    sides: dict[str, Any] = {
        name: {"text_to_video": {"R@1": value, "queries": 9}} for name, value in (("before", 1.0), ("after", 2.0))
    }
    few = {**sides, "gain": {}, "rank_gain": {}, "not_enough_evidence": True, "cross_validation": None}
    assert learning.verdict(few, "if_better")[0] is False
    assert learning.verdict({**sides, "gain": {"mean": 1.0, "low": -2.0, "high": 4.0}}, "if_better")[0] is True


@pytest.mark.parametrize(
    ("queries", "low", "in_use", "opens"),
    [(30, 0.1, False, True), (29, 0.1, False, False), (30, -0.1, False, False), (30, 0.1, True, False)],
)
def test_where_too_few_captions_are_held_out_the_cross_validation_over_all_of_them_tells(
    queries: int, low: float, in_use: bool, opens: bool
) -> None:
    sides: dict[str, Any] = {name: {"text_to_video": {"R@1": value}} for name, value in (("before", 10.0), ("after", 30.0))}
    gains = {name: {"mean": 0.5, "low": low, "high": 1.0} for name in ("gain", "rank_gain")}
    crossed = {"queries": queries, **sides, **gains}
    few = {**sides, "gain": {}, "not_enough_evidence": True, "cross_validation": crossed}
    few |= {"in_use": sides["before"]} if in_use else {}
    activated, reason = learning.verdict(few, "if_better")
    assert activated is opens and ("cross-validated" in reason) is (not in_use and queries >= 30)


def asked(workshop: Workshop) -> Task:
    """A training that waits."""
    collection = workshop.id(workshop.guest.collection())
    with workshop.storage.database.write() as connection:
        return task_rows.add_task(connection, workshop.tenant, collection, "train_adapter", {"recipe": {}, "activate": "never"})


def test_trainings_take_turns_by_tenant(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tenant has one before anyone has a second; one that has run for its turn is put back for another that waits."""
    other = Workshop(new_tenant(workshop.guest.client))
    order: list[str] = []
    turn_over = {"now": True}

    def train(storage: Any, encoder: Any, decoders: Any, trainers: Any, tenant: str, task: Task, *rest: Any) -> dict[str, Any]:
        waited_for = rest[-1]
        order.append(tenant)
        if turn_over.pop("now", False) and waited_for():
            raise TurnOver("stopped after step 7 of 9")
        return {}

    monkeypatch.setattr(learning, "train_adapter", train)
    shift = runner(workshop)
    first, second, theirs = asked(workshop), asked(workshop), asked(other)
    assert shift.run(workshop.tenant, first.id) is not None, "it comes back into the queue"
    with workshop.storage.database.read() as connection:
        waiting = task_rows.task(connection, workshop.tenant, first.id)
    assert (waiting.status, waiting.attempts) == ("queued", 0)
    assert shift.run(workshop.tenant, second.id) is not None, "the other tenant goes first"
    assert shift.run(other.tenant, theirs.id) is None
    assert shift.run(workshop.tenant, second.id) is None and shift.run(workshop.tenant, first.id) is None
    assert order == [workshop.tenant, other.tenant, workshop.tenant, workshop.tenant]


def test_a_tenant_whose_training_never_comes_holds_up_nobody(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Workshop(new_tenant(workshop.guest.client))
    monkeypatch.setattr(learning, "train_adapter", lambda *_: {})
    shift = runner(workshop)
    first, second = asked(workshop), asked(workshop)
    shift.run(workshop.tenant, first.id)
    asked(other)
    tries = 0
    while shift.run(workshop.tenant, second.id) is not None:
        tries += 1
        assert tries < 20
    assert tries == TURN_WAITS


def test_a_training_tells_what_is_left_from_its_first_step(workshop: Workshop) -> None:
    task = asked(workshop)
    with workshop.storage.database.write() as connection:
        task_rows.start_task(connection, workshop.tenant, task.id)
    report = Report(runner(workshop), task)
    report._last = 0.0
    report(Progress("step 1 of 100000", 1, 100_000).within(0, learning.TRAINING))
    assert workshop.guest.get(f"/tasks/{task.id}").json()["eta_seconds"] is not None
