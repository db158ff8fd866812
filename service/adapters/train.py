"""The path of an adapter: captions out, `python -m training` as a child process, the new version in, gate, activation."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import adapters_store
from adapters_store import durable
from service.adapters import adapter_rows, trainer
from service.adapters.activate import Spread, activate_and_tell
from service.adapters.encoder import Encoder
from service.adapters.publish import publish
from service.adapters.trainer import Trainers
from service.errors import PolyclipError
from service.feedback import feedback_rows
from service.feedback.feedback_rows import Verdict
from service.jobs import task_rows
from service.jobs.task_rows import Task
from service.storage import generation_rows
from service.storage.blobs import BlobMissing, adapter_key, frames_key
from service.storage.storage import Storage
from service.storage.tables import now
from service.videos import video_rows
from service.videos.decoders import Decoders
from training.progress import Tell
from training.recipe import InvalidRecipe, Recipe
from training.trainer import EVIDENCE, MINIMUM_QUERIES

MINIMUM_VIDEOS = 10
TRAINING = 0.8  # of a task's progress; the rest is the building of a generation
FIRST = 0.25  # of the progress of a training that begins with the text tower


class TooFewCaptions(PolyclipError):
    """The collection has not enough captioned videos to train on."""

    code, status, hint = "too_few_captions", 409, "add captions to more videos"


def check_captions(connection: Any, tenant: str, collection_id: str) -> None:
    """Raises TooFewCaptions."""
    videos = video_rows.captioned_videos(connection, tenant, collection_id)
    if videos < MINIMUM_VIDEOS:
        raise TooFewCaptions(f"an adapter needs at least {MINIMUM_VIDEOS} ready videos with captions, there are {videos}")


def check_recipe(storage: Storage, encoder: Encoder, values: Mapping[str, Any]) -> Recipe:
    """A recipe from outside, within this service's limits. Raises InvalidRecipe."""
    recipe = Recipe.of(values)
    if recipe.method == "full":
        raise InvalidRecipe("recipe.method must be adapter: a collection has no backbone of its own (python -m training has)")
    recipe.shape(encoder.backbone.dims)
    settings, epochs = storage.settings, storage.settings.training_epochs
    steps, batch = settings.training_steps, settings.training_batch
    recipe.check_limits(
        {"rank": settings.largest_rank, "steps": steps, "minimum_steps": steps, "epochs": epochs, "batch_size": batch}
    )
    return recipe


def train_adapter(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    trainers: Trainers,
    tenant: str,
    task: Task,
    progress: Tell,
    spread: Spread | None = None,
    waited_for: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains, publishes and, as `activate` asks, activates an adapter; returns the task's result.

    With `text_first`, an adapter of the text tower comes before it, whose switch embeds nothing; the second one is then
    compared with it. May be run again after a crash: training goes on from its last checkpoint, unless videos or captions have
    changed, and a published version is not trained again: the task's row names it. `progress` may raise Cancelled.
    After a turn's time, where another tenant's training is `waited_for`, raises TurnOver.
    """

    def stage(made: Mapping[str, Any], recipe: Mapping[str, Any], out: Path, told: Tell) -> dict[str, Any]:
        if "adapter_id" not in made:
            made = _trained(storage, encoder, trainers, tenant, task, recipe, out, told, waited_for)
        return _judged(storage, encoder, decoders, tenant, task, made, told, spread)

    recipe, out, done = task.request["recipe"], _folder(storage, task), dict(task.result or {})
    if not task.request.get("text_first"):
        return stage(done, recipe, out, progress)
    first = done.get("text_first", {})
    if "activated" not in first:
        first = stage(first, {**recipe, "scope": "text"}, out / "text", lambda part: progress(part.within(0, FIRST)))
        done["text_first"] = first
        with storage.database.write() as connection:
            task_rows.set_task(connection, tenant, task.id, result=done)
    return {"text_first": first, **stage(done, recipe, out, lambda part: progress(part.within(FIRST, 1)))}


def _judged(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    task: Task,
    made: Mapping[str, Any],
    progress: Tell,
    spread: Spread | None,
) -> dict[str, Any]:
    """Activates a published version if it is to be; what came of it."""
    collection_id = str(task.collection_id)
    with storage.database.read() as connection:
        version = adapter_rows.adapter(connection, tenant, collection_id, made["adapter_id"])
        active = generation_rows.active_of(connection, tenant, collection_id)
    metrics = version.manifest["metrics"]
    result = {
        **{name: made[name] for name in ("adapter_id", "trained_at")},
        "digest": version.digest,
        "metrics": {name: metrics[name] for name in ("before", "in_use", "after", "gain", "rank_gain") if name in metrics},
        **{name: metrics[name] for name in EVIDENCE if name in metrics},
    }
    wanted = task.request["activate"]
    activated, reason = verdict(metrics, wanted)
    if wanted == "if_better":
        if active.digest not in (version.digest, result["metrics"].get("in_use", {}).get("digest")):
            activated, reason = False, "another adapter came into use while this one was trained: they have not been compared"
        if active.backbone != version.manifest["backbone"]:
            activated, reason = False, "the collection was changed to another backbone while this one was trained"
    if not activated:
        return {**result, "activated": False, "reason": reason}
    tell: Tell = lambda part: progress(part.within(TRAINING, 1))  # noqa: E731
    done = activate_and_tell(
        storage, encoder, decoders, tenant, collection_id, version.id, tell, spread, asked=made["trained_at"]
    )
    return {**result, "reason": reason, **done}


def _trained(
    storage: Storage,
    encoder: Encoder,
    trainers: Trainers,
    tenant: str,
    task: Task,
    recipe: Mapping[str, Any],
    out: Path,
    progress: Tell,
    waited_for: Callable[[], bool],
) -> dict[str, Any]:
    """Trains and publishes; notes in the task's row what came of it, which names the version from then on."""
    collection_id = str(task.collection_id)
    if not (out / "manifest.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        _train(storage, encoder, trainers, tenant, collection_id, recipe, out, progress, waited_for)
    version = publish(storage, encoder, tenant, collection_id, *adapters_store.read(out))
    made = {"adapter_id": version.id, "trained_at": now()}
    with storage.database.write() as connection:
        before = dict(task_rows.task(connection, tenant, task.id).result or {})
        told = {**before, **made} if out == _folder(storage, task) else {**before, "text_first": made}
        task_rows.set_task(connection, tenant, task.id, result=told)
    shutil.rmtree(out, ignore_errors=True)
    return made


def discard(storage: Storage, task: Task) -> None:
    """Removes what a training has left in the scratch folder, the checkpoint that it would go on from too."""
    shutil.rmtree(_folder(storage, task), ignore_errors=True)


def _folder(storage: Storage, task: Task) -> Path:
    return storage.settings.scratch / f"train-{task.id}"


def verdict(metrics: Mapping[str, Any], wanted: str) -> tuple[bool, str]:
    """Whether a trained adapter is activated, and why.

    `if_better` asks that on the held-out captions its R@1 is no worse than that of what is in use now, and that its mean log
    rank is surely no worse: the whole 95 % interval. Where these captions are too few to tell, the cross-validation over all
    captions has to show it, if it was over the frozen backbone and has enough of them.
    """
    if wanted == "always":
        return True, "asked to activate in any case"
    if wanted == "never":
        return False, "asked not to activate"
    now, rival = ("in_use", "the adapter in use") if "in_use" in metrics else ("before", "no adapter")
    crossed = metrics.get("cross_validation") or {}
    if metrics.get("not_enough_evidence") and now == "before" and crossed.get("queries", 0) >= MINIMUM_QUERIES:
        metrics = crossed
    elif metrics.get("not_enough_evidence"):
        queries = metrics["after"]["text_to_video"].get("queries", 0)
        needed = f"at least {MINIMUM_QUERIES} are needed to compare it with {rival}"
        return False, f"not enough evidence: {queries} held-out queries, {needed}"
    before, after = (metrics[side]["text_to_video"]["R@1"] for side in (now, "after"))
    told = f"{'cross-validated' if metrics is crossed else 'validation'} R@1 is {after:g}, and {before:g} with {rival}"
    for name, what in (("gain", "R@1"), ("rank_gain", "log rank")):
        if (gain := metrics.get(name)) is not None:  # a version before the rank's gain was measured is judged without it
            told += f"; gain of {what} {gain['mean']:+.4g}, 95 % interval {gain['low']:+.4g} to {gain['high']:+.4g}"
    return after >= before and metrics.get("rank_gain", {"low": 0.0})["low"] >= 0, told


def _train(
    storage: Storage,
    encoder: Encoder,
    trainers: Trainers,
    tenant: str,
    collection_id: str,
    recipe: Mapping[str, Any],
    out: Path,
    progress: Tell,
    waited_for: Callable[[], bool],
) -> None:
    limit, turn = storage.settings.training_seconds, storage.settings.training_turn_seconds
    with storage.database.read() as connection:
        encoder = encoder.of(generation_rows.active_of(connection, tenant, collection_id).backbone)
    wanted = check_recipe(storage, encoder, recipe)
    with ExitStack() as stack:
        said = _feedback(storage, tenant, collection_id, out / "feedback.json") if wanted.feedback else []
        dataset = _write_dataset(storage, tenant, collection_id, out / "dataset.jsonl", said)
        command = [sys.executable, "-m", "training", "--json", "--dataset", str(dataset), "--out", str(out)]
        command += ["--backbone", encoder.choice.name, "--recipe", json.dumps(dict(recipe)), "--device", str(encoder.device)]
        command += ["--seconds", str(limit)]
        if (rival := _in_use(storage, tenant, collection_id, stack)) is not None:
            command += ["--rival", str(rival)]
        if encoder.choice.pretrained is not None:
            command += ["--pretrained", encoder.choice.pretrained]
        tell: Tell = lambda part: progress(part.within(0, TRAINING))  # noqa: E731
        trainer.run(command, collection_id, trainers, limit, turn, tell, waited_for)


def _in_use(storage: Storage, tenant: str, collection_id: str, stack: ExitStack) -> Path | None:
    """The file of the collection's active adapter, local while `stack` is open; None for the frozen backbone."""
    with storage.database.read() as connection:
        known = generation_rows.generations_of(connection, tenant, collection_id)
    digest = next((g.digest for g in known if g.state == "active"), None)
    return None if digest is None else stack.enter_context(storage.blobs.local(adapter_key(collection_id, digest)))


def _feedback(storage: Storage, tenant: str, collection_id: str, path: Path) -> list[Verdict]:
    """What users had said of hits when the training first started: it goes on from its checkpoint though they say more."""
    if not path.exists():
        with storage.database.read() as connection:
            said = feedback_rows.verdicts(connection, tenant, collection_id)
        durable.write(path, json.dumps([asdict(verdict) for verdict in said]).encode())
    return [Verdict(**verdict) for verdict in json.loads(path.read_bytes())]


def _write_dataset(storage: Storage, tenant: str, collection_id: str, path: Path, said: Sequence[Verdict] = ()) -> Path:
    """The collection's ready videos with captions or feedback as `training.dataset` reads them, frames beside the file."""
    spoken: dict[str, list[dict[str, Any]]] = {}
    for verdict in said:
        told = {"text": verdict.query, "start": verdict.start, "end": verdict.end, "relevant": verdict.relevant}
        spoken.setdefault(verdict.video_id, []).append(told)
    with storage.database.read() as connection:
        check_captions(connection, tenant, collection_id)
        videos = video_rows.videos_of(connection, tenant, collection_id, "ready")
        captions = video_rows.captions_of(connection, tenant, [video.id for video in videos])
    with path.open("w") as file:
        for video in videos:
            if captions[video.id] or video.id in spoken:
                frames = path.with_name(f"{video.id}.zip")
                try:
                    with storage.blobs.local(frames_key(collection_id, video.id)) as blob:
                        frames.unlink(missing_ok=True)
                        os.link(blob, frames)  # a video that is deleted from now on does not break the training
                except (BlobMissing, FileNotFoundError):  # deleted just now
                    continue
                texts = [{"text": c.text, "start": c.start, "end": c.end} for c in captions[video.id]]
                heard = {"feedback": spoken[video.id]} if video.id in spoken else {}
                file.write(json.dumps({"video": video.id, "frames": str(frames), "captions": texts, **heard}) + "\n")
    return path
