"""What a collection's searches are weak at, and what to do about it, from its captions and from what users said.

At most ASKED captions and SPOKEN queries are asked, each as a search asks, under the adapter in use.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backbone import rescore
from service.adapters.encoder import Encoder
from service.adapters.train import MINIMUM_VIDEOS
from service.feedback import feedback_rows
from service.feedback.feedback_rows import Spoken, Verdict
from service.search.views import Views
from service.storage import collection_rows, segment_rows
from service.storage.collection_rows import Collection
from service.storage.generation_rows import Generation
from service.storage.storage import Storage
from service.videos import video_rows
from service.videos.video_rows import Video
from training.dataset import held_out
from training.recipe import Recipe
from training.trainer import MINIMUM_QUERIES

ASKED, SPOKEN = 200, 100
OF_A_VIDEO = 5  # captions that are asked at most
FIRST = 10  # hits among which a video should be
TOLD = 50  # queries and videos in each list of the answer
TOGETHER = 16  # texts that are encoded at once: a search does not wait for more
SEED = 0


@dataclass(slots=True)
class Query:
    """A text that was asked. `video`: whose caption it is, or what users called relevant; `rank`: of the first of these, None
    where it is not among the candidates. `reasons`: why it is weak."""

    text: str
    source: str  # caption, feedback
    videos: frozenset[str]
    relevant: int = 0
    irrelevant: int = 0
    rank: int | None = None
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a new adapter can be judged: by its held-out captions alone, about a fifth of all. `captions_needed`: so many
    more, on further videos; or `held_out_needed` on those that are held out."""

    captioned_videos: int
    videos_needed: int
    held_out_captions: int
    held_out_needed: int
    captions_needed: int


@dataclass(frozen=True, slots=True)
class CheckUp:
    """`never_found`: ready videos that none of the queries found among its first hits, and how many there are; `next`: which to
    caption next, and why."""

    collection: Collection
    generation: Generation
    ready: int
    captions: int
    asked: int
    weak: Sequence[Query]
    weak_total: int
    never_found: Sequence[Video]
    never_found_total: int
    next: Sequence[tuple[Video, str]]
    gate: Gate


def check_up(
    storage: Storage,
    encoder: Encoder,
    views: Views,
    tenant: str,
    name: str,
    with_feedback: bool = True,
    go_on: Callable[[], None] = lambda: None,
) -> CheckUp:
    """Looks a collection through. `go_on` is called again and again and may raise to stop. Raises NotFound.

    `with_feedback` False: the queries of users are asked, and their videos count as found, but their texts are not told.
    """
    with storage.database.read() as connection:
        collection, generation = collection_rows.active_generation(connection, tenant, name)
        counts = video_rows.caption_counts(connection, tenant, collection.id)  # of every ready video
        spoken = feedback_rows.spoken(connection, tenant, collection.id)
        verdicts = feedback_rows.verdicts(connection, tenant, collection.id)
        captioned = sorted(video for video, count in counts.items() if count)
        drawn = random.Random(SEED).sample(captioned, min(ASKED, len(captioned)))
        texts = video_rows.first_captions(connection, tenant, drawn, OF_A_VIDEO)
    queries = _captions(drawn, texts) + _spoken(spoken, verdicts)
    found: set[str] = set()
    for query, hits in zip(queries, _asked(storage, encoder, views, tenant, generation, queries, go_on), strict=True):
        found |= set(hits[:FIRST])
        query.rank = next((i for i, video in enumerate(hits, start=1) if video in query.videos), None)
        if query.videos and (query.rank is None or query.rank > FIRST):
            query.reasons.append("caption_not_found" if query.source == "caption" else "relevant_not_found")
        if query.irrelevant > query.relevant:
            query.reasons.append("called_irrelevant")
    weak = [query for query in queries if query.reasons and (with_feedback or query.source == "caption")]
    weak.sort(key=lambda query: (-query.irrelevant, -(query.rank or 1 << 30)))
    lost = sorted(set(counts) - found)
    uncaptioned = [video for video in sorted(counts) if not counts[video]]
    asked_in_vain = {video for query in queries if query.source == "caption" and query.reasons for video in query.videos}
    lost.sort(key=lambda video: (video not in asked_in_vain, video))
    lost_set = set(lost)
    uncaptioned.sort(key=lambda video: (video not in lost_set, video))
    following = [(video, "no_captions") for video in uncaptioned] + [(v, "never_found") for v in lost if counts[v]]
    with storage.database.read() as connection:
        ids = [*lost[:TOLD], *(video for video, _ in following[:TOLD])]
        videos = video_rows.videos_by_id(connection, tenant, dict.fromkeys(ids))
    return CheckUp(
        collection,
        generation,
        len(counts),
        sum(counts.values()),
        len(queries),
        weak[:TOLD],
        len(weak),
        [videos[video] for video in lost[:TOLD] if video in videos],
        len(lost),
        [(videos[video], why) for video, why in following[:TOLD] if video in videos],
        _gate({video: counts[video] for video in captioned}),
    )


def _captions(drawn: Sequence[str], texts: dict[str, list[str]]) -> list[Query]:
    """Up to ASKED captions, one of each video before a second of any."""
    rounds = [(video, texts[video][turn]) for turn in range(OF_A_VIDEO) for video in drawn if turn < len(texts[video])]
    return [Query(text, "caption", frozenset((video,))) for video, text in rounds[:ASKED]]


def _spoken(spoken: Sequence[Spoken], verdicts: Sequence[Verdict]) -> list[Query]:
    liked: dict[str, set[str]] = {}
    for verdict in verdicts:
        if verdict.relevant:
            liked.setdefault(verdict.query, set()).add(verdict.video_id)
    return [
        Query(said.query, "feedback", frozenset(liked.get(said.query, ())), said.relevant, said.irrelevant)
        for said in spoken[:SPOKEN]
    ]


def _asked(
    storage: Storage,
    encoder: Encoder,
    views: Views,
    tenant: str,
    generation: Generation,
    queries: Sequence[Query],
    go_on: Callable[[], None],
) -> list[list[str]]:
    """The videos that each query finds among its candidates, best first."""
    if not queries:
        return []
    go_on()
    encoder = encoder.of(generation.backbone)
    view = views.view(tenant, generation)
    found: list[list[str]] = []
    for first in range(0, len(queries), TOGETHER):
        go_on()
        tokens = encoder.backbone.tokenize([query.text for query in queries[first : first + TOGETHER]]).ids
        with encoder.lease(generation) as lease:  # in a group of its own: the tenant's searches do not queue behind it
            waiting = [encoder.texts.submit((row, lease), group=f"{tenant}, check-up") for row in tokens]
            vectors: list[NDArray[np.float32]] = [future.result() for future in waiting]
        for vector in vectors:
            go_on()
            pool = view.search(vector, storage.settings.candidates)
            with storage.database.read() as connection:  # beside the searches' cache, which this would empty
                frames = segment_rows.frame_vectors(connection, tenant, generation.vector_set, [c.seq for c in pool])
            held = [c for c in pool if c.seq in frames]
            scores = rescore(vector, [frames[c.seq] for c in held]) if held else np.empty(0)
            found.append(list(dict.fromkeys(held[i].segment.video_id for i in np.argsort(-scores, kind="stable"))))
    return found


def _gate(counts: dict[str, int]) -> Gate:
    """`counts`: captions by captioned video. Which videos a training holds out is known from their ids."""
    share = Recipe().validation
    held = held_out(list(counts), share) if len(counts) > 1 else ()
    captions = sum(counts[video] for video in held)
    needed = max(0, MINIMUM_QUERIES - captions)
    return Gate(len(counts), max(0, MINIMUM_VIDEOS - len(counts)), captions, needed, math.ceil(needed / share))
