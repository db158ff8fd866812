"""What is asked of a collection, under which generation, and how it becomes one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy import Connection

from backbone import Tokens, to_pixels
from service.adapters import adapter_rows
from service.adapters.backbones import check_usable
from service.adapters.encoder import Encoder
from service.errors import PolyclipError
from service.search.text_cache import TextCache, TextKey, text_key
from service.storage import collection_rows, generation_rows, segment_rows
from service.storage.collection_rows import Collection
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.videos import video_rows

MOST_TEXTS = 16
NOT_WEIGHT = 0.5  # docs/searching.md has what was measured
TEXT_WEIGHT = 0.5
LEAST = 1e-3  # length of what is left of unit vectors, below which it points nowhere
NO_ADAPTER = "none"

Vector = NDArray[np.float32]


class EmptyText(PolyclipError):
    """The text has nothing but white space."""

    code, status, hint = "empty_text", 422, "send a text with words"


class NothingLeft(PolyclipError):
    """What is not to be seen takes away all that is to be seen."""

    code, status, hint = "nothing_left", 422, "send another `not`, or a smaller `not_weight`"


class GenerationUnusable(PolyclipError):
    """The generation that is asked for holds no vectors, or is being built."""

    code, status, hint = "generation_unusable", 409, "activate the adapter once, or wait until that has been done"


class NoVectors(PolyclipError):
    """The video has no vectors in the generation that is searched."""

    code, status, hint = "video_without_vectors", 409, "wait until the video is ready, or take another generation"


class InvalidPart(PolyclipError):
    """The part of the video does not begin before it ends, or lies beyond the video's end."""

    code, status, hint = "invalid_part", 422, "send a `start` and an `end` within the video"


@dataclass(frozen=True, slots=True)
class VideoPart:
    """A video, or what it shows between two times in seconds (None: from its beginning, to its end)."""

    video_id: str
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asks: for texts, a picture (`text_weight` is the texts' share, if there are both) or a part of a video,
    and not for `without`. `generation` or `adapter`: under which, instead of the active one; `adapter` "none" is the frozen
    backbone.
    """

    texts: tuple[str, ...] = ()
    picture: Image.Image | None = None
    part: VideoPart | None = None
    without: str | None = None
    not_weight: float = NOT_WEIGHT
    text_weight: float = TEXT_WEIGHT
    generation: str | None = None
    adapter: str | None = None

    @property
    def every_text(self) -> tuple[str, ...]:
        """`without` is the last, where it is asked for."""
        return self.texts if self.without is None else (*self.texts, self.without)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, of which collection, and with which generation: adapter and vectors, read in one step.

    `keys`: of `every_text`; `tokens`: of those whose vectors are not kept already.
    `pixels` are to be encoded with the adapter of `maker`, which made the generation's vectors; `frames` are a video's own.
    """

    tenant: str
    collection: Collection
    generation: Generation
    encoder: Encoder
    asked: Asked
    keys: tuple[TextKey, ...]
    maker: Generation
    tokens: Mapping[TextKey, Tokens] = field(default_factory=dict)
    pixels: NDArray[np.uint8] | None = None
    frames: Vector | None = None

    @property
    def active(self) -> bool:
        return self.generation.id == self.collection.active_generation_id

    @property
    def left_out(self) -> frozenset[str]:
        """Videos that are no answer: the one whose like is looked for."""
        return frozenset() if self.asked.part is None else frozenset([self.asked.part.video_id])


def resolve(
    storage: Storage, encoder: Encoder, kept: TextCache, tenant: str, collection_name: str, asked: Asked
) -> Question | Future[Encoder]:
    """The question, or what has to be there first. `kept`: vectors of texts.

    Raises NotFound, EmptyText, GenerationUnusable, TooManyBackbones, NoVectors, InvalidPart, OtherBackbone.
    """
    with storage.database.read() as connection:
        collection, generation = collection_rows.active_generation(connection, tenant, collection_name)
        if asked.generation is not None or asked.adapter is not None:
            generation = _other_generation(connection, collection, generation, asked)
        maker = generation
        if asked.picture is not None and generation.vector_set != generation.id:
            maker = generation_rows.generation(connection, tenant, generation.vector_set)
        frames = None if asked.part is None else _stored_frames(connection, collection, generation, asked.part)
    keys = tuple(text_key(tenant, generation.digest or generation.backbone, text) for text in asked.every_text)
    if not all(key.text for key in keys) or not (asked.texts or asked.picture or asked.part):
        raise EmptyText("a text is empty" if len(keys) > 1 else "the text is empty")
    loading = encoder.request_encoder(generation.backbone)
    if not loading.done():
        return loading
    encoder = loading.result()
    tokens = {key: encoder.backbone.tokenize([key.text]) for key in keys if key not in kept}  # not on the event loop
    pixels = None if asked.picture is None else to_pixels(asked.picture, encoder.backbone.form)[None]
    return Question(tenant, collection, generation, encoder, asked, keys, maker, tokens, pixels, frames)


def combined(question: Question, texts: Sequence[Vector], frames: Vector | None) -> Vector:
    """The vector (D,) that is searched with: of one text, or one picture, its own; otherwise the weighted mean of unit vectors,
    less `not_weight` times that of `without`, as long as what it is made of is on average: rescoring weighs frames by it.

    `texts`: the vectors of the question's keys; `frames` (N, D): of its picture, or its part of a video. Raises NothingLeft.
    """
    asked, wanted = question.asked, texts[: len(question.asked.texts)]
    if len(texts) == 1 and frames is None:
        return texts[0]
    share = asked.text_weight if frames is not None and wanted else float(frames is None)
    parts = [(share / len(wanted), text) for text in wanted]
    parts += [] if frames is None else [((1 - share) / len(frames), frame) for frame in frames]
    direction: Vector = np.sum([weight * _unit(vector) for weight, vector in parts], axis=0)
    length = sum(weight * float(np.linalg.norm(vector)) for weight, vector in parts)
    if asked.without is not None:
        direction = direction - asked.not_weight * _unit(texts[-1])
    if np.linalg.norm(direction) < LEAST:
        raise NothingLeft("what is asked for and what is not to be seen are the same")
    return (length * _unit(direction)).astype(np.float32)


def _unit(vector: Vector) -> Vector:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-12))


def _other_generation(connection: Connection, collection: Collection, active: Generation, asked: Asked) -> Generation:
    """The generation that is asked for; of an adapter's, the one used last. Raises NotFound, GenerationUnusable,
    TooManyBackbones: a search loads no third backbone in place of one that is in use.
    """
    tenant, adapter = collection.tenant_id, asked.adapter
    found = generation_rows.generations_of(connection, tenant, collection.id)
    if asked.generation is not None:
        found = [generation for generation in found if generation.id == asked.generation]
        if not found:
            raise NotFound("generation", asked.generation)
        adapter = found[0].adapter_id or NO_ADAPTER
    elif adapter == NO_ADAPTER:
        found = [generation for generation in found if generation.adapter_id is None and generation.backbone == active.backbone]
    else:
        found = [generation for generation in found if generation.adapter_id == adapter]
    if adapter is not None and adapter != NO_ADAPTER:
        adapter_rows.adapter(connection, tenant, collection.id, adapter)  # deleted, its vectors may stand a while
    if not found:
        raise GenerationUnusable(f"adapter {adapter!r:.80} has not been active: there are no vectors of it")
    built = [generation for generation in found if generation.state != "building"]
    if not built:
        raise GenerationUnusable(f"generation {found[0].id} is being built")
    chosen = max(built, key=lambda generation: (generation.id == active.id, generation.activated_at or ""))
    check_usable(connection, chosen.backbone)
    return chosen


def _stored_frames(connection: Connection, collection: Collection, generation: Generation, part: VideoPart) -> Vector:
    """The frame vectors (N, D) of a part of the collection's own video: of the frames within it, or the one nearest to it."""
    tenant = collection.tenant_id
    video = video_rows.video(connection, tenant, part.video_id, collection.id)
    rows = segment_rows.segments_of(connection, tenant, generation.vector_set, video.id)
    if not rows:
        raise NoVectors(f"video {video.id} is {video.status}: it has no vectors in generation {generation.id}")
    ends = max(row.end for row in rows)
    start, end = part.start or 0.0, ends if part.end is None else part.end
    if not 0 <= start < min(end, ends):
        raise InvalidPart(f"{start:g} to {end:g} s is no part of a video of {ends:g} s")
    vectors = [np.frombuffer(row.frames, np.float16).reshape(-1, len(row.pooled) // 2) for row in rows]
    times = [  # each stands for the middle of its slice of the segment
        row.start + (np.arange(len(frames)) + 0.5) * (row.end - row.start) / len(frames)
        for row, frames in zip(rows, vectors, strict=True)
    ]
    frames, at = np.concatenate(vectors), np.concatenate(times)
    within = (at >= start) & (at <= end)
    if not within.any():
        within[np.abs(at - (start + min(end, ends)) / 2).argmin()] = True
    return frames[within].astype(np.float32)
