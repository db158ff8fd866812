"""A newly ready video is compared with the alerts of its collection, as a search for their texts would see it.

May be broken off anywhere and run again: an alert has one event of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbone import rescore_all
from service.adapters.encoder import Encoder
from service.alerts import alert_rows
from service.alerts.alert_rows import Alert, Match
from service.jobs.task_rows import Task
from service.storage import generation_rows, segment_rows
from service.storage.generation_rows import Generation
from service.storage.rows import NotFound
from service.storage.storage import Storage
from service.videos import video_rows
from training.progress import Progress, Tell

TOGETHER = 100  # alerts whose events are written in one transaction


def match_alerts(
    storage: Storage, encoder: Encoder, tenant: str, task: Task, progress: Tell, hand_on: Callable[[Task], None]
) -> dict[str, Any]:
    """Compares a video with the alerts that stood when it became ready; `hand_on` is given the tasks that deliver events.

    Returns the task's result: how many alerts there were, and how many new events. Nothing of a video that has been deleted.
    """
    collection, video = str(task.collection_id), task.request["video_id"]
    with storage.database.read() as connection:
        standing = alert_rows.alerts_of(connection, tenant, collection, task.created_at)
        try:
            video_rows.video(connection, tenant, video, collection)
            generation = generation_rows.active_of(connection, tenant, collection)
        except NotFound:
            standing = []
        else:
            segments = segment_rows.segments_of(connection, tenant, generation.vector_set, video)
    events = 0
    for first in range(0, len(standing), TOGETHER):
        progress(Progress("comparing", first, len(standing)))
        some = standing[first : first + TOGETHER]
        scores = rescore_all(_vectors(storage, encoder, generation, some), [segment.frames for segment in segments])
        found = [_best(alert, own, segments) for alert, own in zip(some, scores, strict=True)]
        matches = [match for match in found if match.alert.min_score is None or match.score >= match.alert.min_score]
        with storage.database.write() as connection:
            count, deliveries = alert_rows.add_events(connection, tenant, collection, generation.id, video, matches)
        events += count
        for delivery in deliveries:
            hand_on(delivery)
    return {"video_id": video, "alerts": len(standing), "events": events}


def _best(alert: Alert, scores: NDArray[np.float32], segments: Sequence[Any]) -> Match:
    best = int(scores.argmax())
    return Match(alert, segments[best].start, segments[best].end, round(float(scores[best]), 6))


def _vectors(storage: Storage, encoder: Encoder, generation: Generation, standing: Sequence[Alert]) -> NDArray[np.float32]:
    """(alerts, D): the texts under the generation's adapter; each is encoded once and kept until another adapter is in use."""
    made_by = generation.digest or generation.backbone
    vectors = {a.id: np.frombuffer(a.vector, np.float32) for a in standing if a.vector and a.encoder == made_by}
    if missing := [alert for alert in standing if alert.id not in vectors]:
        encoder = encoder.of(generation.backbone)
        tokens = encoder.backbone.tokenize([alert.text for alert in missing]).ids
        with encoder.lease(generation) as lease:
            waiting = [encoder.texts.submit((row, lease), group=generation.tenant_id) for row in tokens]
            made = {alert.id: future.result() for alert, future in zip(missing, waiting, strict=True)}
        with storage.database.write() as connection:
            kept = {alert_id: vector.astype(np.float32).tobytes() for alert_id, vector in made.items()}
            alert_rows.keep_vectors(connection, generation.tenant_id, made_by, kept)
        vectors |= made
    return np.stack([vectors[alert.id] for alert in standing])
