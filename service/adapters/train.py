"""The path of an adapter: captions out, `python -m training` as a child process, the new version in, gate, activation."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

import numpy as np
import structlog

import adapters_store
from backbone import rescore_all
from service.adapters import activate as generations
from service.adapters import adapter_rows
from service.adapters.activate import Spread, Superseded
from service.adapters.adapter_rows import AdapterVersion
from service.adapters.encoder import Encoder
from service.errors import ERRNO, PolyclipError
from service.jobs import task_rows
from service.jobs.kinds import JobFailed, TurnOver
from service.jobs.supervisor import without_root_key
from service.jobs.task_rows import Task
from service.storage import collection_rows, generation_rows, rows, segment_rows
from service.storage.blobs import BlobMissing, adapter_key, frames_key, thumbnail_key
from service.storage.storage import Storage
from service.storage.tables import now
from service.videos import video_rows
from service.videos.decoders import Decoders
from training.dataset import Pair
from training.evaluation import Evaluation
from training.recipe import InvalidRecipe, Recipe
from training.trainer import EVIDENCE, MINIMUM_QUERIES

Trainers = set[subprocess.Popen[str]]  # training processes that are children of this one

log = structlog.get_logger()

MINIMUM_VIDEOS = 10
GRACE, GRACE_SECONDS = 1.5, 600.0  # a training is waited for so much longer than its steps may take: decoding, folds
TRAINING, BUILDING = 0.8, 0.2  # shares of a task's progress
MAY_PASS = ("io_error", "in_use", "stopped")  # codes of the training process
OUT_OF_MEMORY = (  # in the words of torch, oneDNN, Python, C++
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "could not create a primitive",
    "MemoryError",
    "bad_alloc",
)


class TooFewCaptions(PolyclipError):
    """The collection has not enough captioned videos to train on."""

    code, status, hint = "too_few_captions", 409, "add captions to more videos"


class TrainingFailed(JobFailed):
    """The training process ended without an adapter; `code` and the message are its own words."""

    code, hint = "training_failed", "`code` and `detail` are those of `python -m training`"

    def __init__(self, code: str, detail: str) -> None:
        lasts = code == "io_error" and any(os.strerror(number) in detail for number in ERRNO)
        super().__init__(code, detail, code in MAY_PASS, lasts)


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
    progress: Callable[[float, str], None],
    spread: Spread | None = None,
    waited_for: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains, publishes and, as `activate` asks, activates an adapter; returns the task's result.

    May be run again after a crash: training goes on from its last checkpoint, unless videos or captions have changed, and a
    version that has been published is not trained again: the task's row names it. `progress` may raise Cancelled.
    After a turn's time, where another tenant's training is `waited_for`, raises TurnOver.
    """
    collection_id = str(task.collection_id)
    made = task.result or _trained(storage, encoder, trainers, tenant, task, progress, waited_for)
    with storage.database.read() as connection:
        version = adapter_rows.adapter(connection, tenant, collection_id, made["adapter_id"])
        known = generation_rows.generations_of(connection, tenant, collection_id)
    metrics = version.manifest["metrics"]
    result = {
        **made,
        "digest": version.digest,
        "metrics": {name: metrics[name] for name in ("before", "in_use", "after", "gain") if name in metrics},
        **{name: metrics[name] for name in EVIDENCE if name in metrics},
    }
    wanted = task.request["activate"]
    activated, reason = verdict(metrics, wanted)
    in_use = next((g.digest for g in known if g.state == "active"), None)
    if wanted == "if_better" and in_use not in (version.digest, result["metrics"].get("in_use", {}).get("digest")):
        activated, reason = False, "another adapter came into use while this one was trained: they have not been compared"
    if not activated:
        return {**result, "activated": False, "reason": reason}

    def tell(share: float, message: str) -> None:
        progress(TRAINING + BUILDING * share, message)

    done = activate(storage, encoder, decoders, tenant, collection_id, version.id, tell, spread, asked=made["trained_at"])
    return {**result, "reason": reason, **done}


def _trained(
    storage: Storage,
    encoder: Encoder,
    trainers: Trainers,
    tenant: str,
    task: Task,
    progress: Callable[[float, str], None],
    waited_for: Callable[[], bool],
) -> dict[str, Any]:
    """Trains and publishes; notes in the task's row what came of it, which names the version from then on."""
    collection_id = str(task.collection_id)
    out = _folder(storage, task)
    if not (out / "manifest.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        _train(storage, encoder, trainers, tenant, collection_id, task.request["recipe"], out, progress, waited_for)
    version = publish(storage, encoder, tenant, collection_id, *adapters_store.read(out))
    made = {"adapter_id": version.id, "trained_at": now()}
    with storage.database.write() as connection:
        task_rows.set_task(connection, tenant, task.id, result=made)
    discard(storage, task)
    return made


def discard(storage: Storage, task: Task) -> None:
    """Removes what a training has left in the scratch folder, the checkpoint that it would go on from too."""
    shutil.rmtree(_folder(storage, task), ignore_errors=True)


def _folder(storage: Storage, task: Task) -> Path:
    return storage.settings.scratch / f"train-{task.id}"


def verdict(metrics: Mapping[str, Any], wanted: str) -> tuple[bool, str]:
    """Whether a trained adapter is activated, and why: `if_better` asks that its R@1 on the held-out videos is no worse than
    that of what is in use now, measured on the same captions, and that these are enough to tell.
    """
    if wanted == "always":
        return True, "asked to activate in any case"
    if wanted == "never":
        return False, "asked not to activate"
    now, rival = ("in_use", "the adapter in use") if "in_use" in metrics else ("before", "no adapter")
    if metrics.get("not_enough_evidence"):
        queries = metrics["after"]["text_to_video"].get("queries", 0)
        needed = f"at least {MINIMUM_QUERIES} are needed to compare it with {rival}"
        return False, f"not enough evidence: {queries} held-out queries, {needed}"
    before, after = (metrics[side]["text_to_video"]["R@1"] for side in (now, "after"))
    gain = metrics["gain"]
    sure = f"{gain['mean']:+.1f}, 95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}"
    return after >= before, f"validation R@1 is {after:g}, and {before:g} with {rival} ({sure})"


def activate_adapter(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    task: Task,
    progress: Callable[[float, str], None],
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Activates an adapter, or the frozen backbone, as a task asks; returns its result."""
    adapter = task.request["adapter_id"]
    done = activate(
        storage, encoder, decoders, tenant, str(task.collection_id), adapter, progress, spread, asked=task.created_at
    )
    return {"adapter_id": adapter, **done}


def activate(
    storage: Storage,
    encoder: Encoder,
    decoders: Decoders,
    tenant: str,
    collection_id: str,
    adapter_id: str | None,
    progress: Callable[[float, str], None],
    spread: Spread | None,
    asked: str,
) -> dict[str, Any]:
    """`generations.activate` with a task's progress: what came of it, for the task's result."""

    def tell(done: int, total: int) -> None:
        progress(done / total, f"embedding the missing videos: {done} of {total}")

    try:
        active = generations.activate(storage, encoder, decoders, tenant, collection_id, adapter_id, tell, spread, asked)
    except Superseded as error:
        return {"activated": False, "reason": str(error)}
    return {"activated": True, "generation_id": active.generation.id, "embedded": active.embedded}


def publish(
    storage: Storage, encoder: Encoder, tenant: str, collection_id: str, data: bytes, manifest: adapters_store.Manifest
) -> AdapterVersion:
    """Stores an adapter as the collection's next version. Raises as `check_adapter` does."""
    check_adapter(storage, encoder, data)
    with storage.database.write() as connection:
        if collection_rows.lock_collection(connection, tenant, collection_id) is None:
            raise rows.NotFound("collection", collection_id)
        storage.blobs.put(adapter_key(collection_id, manifest.digest), data)  # under the lock: a purge of the same bytes waits
        return adapter_rows.add_adapter(connection, tenant, collection_id, manifest.to_json())


def check_adapter(storage: Storage, encoder: Encoder, data: bytes) -> adapters_store.Artifact:
    """An adapter file that may be published: for this backbone, of a rank that is taken, with answers that are finite.

    It is tried on a text and a frame the way that searches use it, in the device's precision. Raises InvalidAdapter,
    AdapterMismatch, LeaseTimeout.
    """
    artifact = adapters_store.unpack(data, encoder.fit)
    backbone, seconds = encoder.backbone, storage.settings.search_seconds
    side = backbone.image_size
    frame = (np.arange(3 * side * side, dtype=np.int64) % 251).astype(np.uint8).reshape(1, 3, side, side)
    with encoder.residency.lease(artifact.digest, lambda: data, seconds) as lease:
        tried = [
            encoder.texts.submit((backbone.tokenize(["a video"]).ids[0], lease)).result(seconds),
            encoder.frames.submit((frame, lease)).result(seconds),
        ]
    if not all(np.isfinite(vectors).all() for vectors in tried):
        raise adapters_store.InvalidAdapter("the adapter's weights are too large: its answers are not finite numbers")
    return artifact


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the searches of a collection find of its own captions; `pairs` are the queries, `thumbnail` by `Pair.clip`."""

    found: Evaluation
    pairs: Sequence[Pair]
    thumbnail: Callable[[int], bytes | None]


def evaluate(storage: Storage, encoder: Encoder, tenant: str, collection_name: str, split: str) -> Assessment:
    """Recall of the collection's captions over its stored vectors, with the adapter in use: what its searches see.

    `split`: `validation`, the videos that the adapter in use was not trained on, or `all`. Raises TooFewCaptions.
    """
    with storage.database.read() as connection:
        collection, generation = collection_rows.active_generation(connection, tenant, collection_name)
        held_out: set[str] | None = None
        if split == "validation" and generation.adapter_id is not None:
            manifest = adapter_rows.adapter(connection, tenant, collection.id, generation.adapter_id).manifest
            held_out = set(manifest["data"].get("validation_videos", ())) or None
        videos = video_rows.videos_of(connection, tenant, collection.id, "ready")
        captions = video_rows.captions_of(connection, tenant, [video.id for video in videos])
        gallery = [v.id for v in videos if captions[v.id] and (held_out is None or v.id in held_out)]
        vectors = segment_rows.video_vectors(connection, tenant, generation.vector_set, gallery)
    gallery = [video for video in gallery if video in vectors]
    if len(gallery) < 2:
        raise TooFewCaptions(f"an evaluation needs at least 2 captioned videos, there are {len(gallery)}")
    texts = [(column, caption.text) for column, video in enumerate(gallery) for caption in captions[video]]
    tokens = encoder.backbone.tokenize([text for _, text in texts]).ids
    with encoder.lease(generation) as lease:
        parts = tokens.split(storage.settings.batch_texts)
        queries = [f.result() for part in parts for f in [encoder.texts.submit((row, lease), group=tenant) for row in part]]
    frames = [segment for video in gallery for segment in vectors[video]]
    owners = np.repeat(np.arange(len(gallery)), [len(vectors[video]) for video in gallery])
    scores = rescore_all(np.stack(queries), frames)  # (captions, segments)
    similarity = np.stack([scores[:, owners == i].max(axis=1) for i in range(len(gallery))], axis=1)  # best segment counts
    pairs = [Pair(column, text, gallery[column]) for column, text in texts]
    found = Evaluation.of(similarity, [pair.clip for pair in pairs], [pair.video for pair in pairs])
    return Assessment(found, pairs, lambda clip: _thumbnail(storage, collection.id, gallery[clip]))


def _thumbnail(storage: Storage, collection_id: str, video_id: str) -> bytes | None:
    try:
        return storage.blobs.get(thumbnail_key(collection_id, video_id, 0))
    except BlobMissing:
        return None


def _train(
    storage: Storage,
    encoder: Encoder,
    trainers: Trainers,
    tenant: str,
    collection_id: str,
    recipe: Mapping[str, Any],
    out: Path,
    progress: Callable[[float, str], None],
    waited_for: Callable[[], bool],
) -> None:
    limit, turn = storage.settings.training_seconds, storage.settings.training_turn_seconds
    check_recipe(storage, encoder, recipe)
    with ExitStack() as stack:
        dataset = _write_dataset(storage, tenant, collection_id, out / "dataset.jsonl")
        command = [sys.executable, "-m", "training", "--json", "--dataset", str(dataset), "--out", str(out)]
        command += ["--backbone", encoder.choice.name, "--recipe", json.dumps(dict(recipe)), "--device", str(encoder.device)]
        command += ["--seconds", str(limit)]
        if (rival := _in_use(storage, tenant, collection_id, stack)) is not None:
            command += ["--rival", str(rival)]
        if encoder.choice.pretrained is not None:
            command += ["--pretrained", encoder.choice.pretrained]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=without_root_key(os.environ),
        )
        stack.callback(_end, trainers, child)
        trainers.add(child)
        killed = _killed_for_memory()
        _first_to_be_killed(child)
        last_words: deque[str] = deque(maxlen=20)
        assert child.stderr is not None and child.stdout is not None
        listener = threading.Thread(target=_read, args=(child.stderr, last_words.append), daemon=True)
        listener.start()
        share, note, recall = 0.0, "preparing", ""
        started, stepping, asked = time.monotonic(), math.inf, False
        for line in _lines(child.stdout):
            clock = time.monotonic()
            if clock - started > GRACE * limit + GRACE_SECONDS:
                raise TrainingFailed("training_timeout", f"the training has not ended long after its {limit:g} s")
            if clock - stepping > turn and not asked and waited_for():
                asked = True
                child.terminate()  # it stops after a checkpoint
            if line is None:
                progress(share, note)
                continue
            event = json.loads(line)
            if event["event"] == "error" and event["code"] == "stopped" and asked:
                raise TurnOver(event["detail"])
            if event["event"] == "error":
                raise _failure(event["code"], event["detail"])
            if event["event"] == "resumed":
                log.info("training_resumed", collection=collection_id, step=event["step"])
            if event["event"] == "validation":
                recall = f", validation R@1 {event['text_to_video']['R@1']:g}"
            if event["event"] == "step":
                stepping = min(stepping, clock)
                share = TRAINING * event["step"] / event["work"]
            if event["event"] == "cross_validation":
                stepping = math.inf  # what it has done it would do anew
                share = TRAINING * (1 + event["step"] / event["steps"]) / 2
                note = f"cross-validation: part {event['step'] + 1} of {event['steps']}{recall}"
                progress(share, note)
            if event["event"] in ("step", "validation"):
                note = f"step {event['step']} of {event['steps']}{recall}"
                progress(share, note)
        if child.wait() == -signal.SIGKILL and _killed_for_memory() > killed:
            raise _failure("out_of_memory", "the system killed it")
        if child.returncode != 0:
            listener.join(timeout=1)
            words = last_words[-1].strip() if last_words else ""
            raise _failure("training_crashed", f"the training process ended with status {child.returncode}. {words}")


def _failure(code: str, detail: str) -> TrainingFailed:
    if code == "out_of_memory" or any(words in detail for words in OUT_OF_MEMORY):
        hint = "a smaller `micro_batch` in the recipe needs less"
        code, detail = "training_out_of_memory", f"the training ran out of memory: {hint} ({detail})"
    return TrainingFailed(code, detail[:500])


def _in_use(storage: Storage, tenant: str, collection_id: str, stack: ExitStack) -> Path | None:
    """The file of the collection's active adapter, local while `stack` is open; None for the frozen backbone."""
    with storage.database.read() as connection:
        known = generation_rows.generations_of(connection, tenant, collection_id)
    digest = next((g.digest for g in known if g.state == "active"), None)
    return None if digest is None else stack.enter_context(storage.blobs.local(adapter_key(collection_id, digest)))


def _write_dataset(storage: Storage, tenant: str, collection_id: str, path: Path) -> Path:
    """The collection's ready, captioned videos as `training.dataset` reads them, their frames beside the file."""
    with storage.database.read() as connection:
        check_captions(connection, tenant, collection_id)
        videos = video_rows.videos_of(connection, tenant, collection_id, "ready")
        captions = video_rows.captions_of(connection, tenant, [video.id for video in videos])
    with path.open("w") as file:
        for video in videos:
            if captions[video.id]:
                frames = path.with_name(f"{video.id}.zip")
                try:
                    with storage.blobs.local(frames_key(collection_id, video.id)) as blob:
                        frames.unlink(missing_ok=True)
                        os.link(blob, frames)  # a video that is deleted from now on does not break the training
                except (BlobMissing, FileNotFoundError):  # deleted just now
                    continue
                texts = [{"text": c.text, "start": c.start, "end": c.end} for c in captions[video.id]]
                file.write(json.dumps({"video": video.id, "frames": str(frames), "captions": texts}) + "\n")
    return path


def _read(stream: IO[str], take: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            take(line)


def _lines(stream: IO[str]) -> Iterator[str | None]:
    """The lines of a stream, and None after each second without one."""
    queue: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        _read(stream, queue.put)
        queue.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        try:
            if (line := queue.get(timeout=1.0)) is None:
                return
            yield line
        except Empty:
            yield None


def _first_to_be_killed(child: subprocess.Popen[str]) -> None:
    """Where memory runs out, the kernel ends the training and not what serves or waits."""
    with suppress(OSError):
        Path(f"/proc/{child.pid}/oom_score_adj").write_text("800")


def _killed_for_memory() -> int:
    """How many processes the kernel has killed since it started because memory ran out."""
    with suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _end(trainers: Trainers, child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    trainers.discard(child)
