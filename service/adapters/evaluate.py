"""How well a collection's own captions find their videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from backbone import rescore_all
from service.adapters import adapter_rows
from service.adapters.encoder import Encoder
from service.adapters.train import TooFewCaptions
from service.storage import collection_rows, segment_rows
from service.storage.blobs import BlobMissing, thumbnail_key
from service.storage.storage import Storage
from service.videos import video_rows
from training.dataset import Pair
from training.evaluation import Evaluation


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
    encoder = encoder.of(generation.backbone)
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
