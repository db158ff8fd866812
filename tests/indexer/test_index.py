import threading

import numpy as np
import torch

from backbone import TEMPERATURE, q_score
from indexer.index import IndexView, rescore

DIM = 16


def row(seq: int, video: str, ordinal: int = 0, seed: int | None = None) -> dict[str, object]:
    vector = np.random.default_rng(seq if seed is None else seed).normal(size=DIM)
    pooled = (vector / np.linalg.norm(vector)).astype(np.float16).tobytes()
    return {"seq": seq, "video_id": video, "ordinal": ordinal, "start": 1.0 * ordinal, "end": ordinal + 1.0, "pooled": pooled}


def vector(seq: int) -> np.ndarray:
    return np.random.default_rng(seq).normal(size=DIM).astype(np.float32)


def tombstone(seq: int, video: str) -> dict[str, object]:
    return {"seq": seq, "video_id": video, "ordinal": -1, "start": None, "end": None, "pooled": None}


def found(view: IndexView, query: np.ndarray, k: int = 10, videos: set[str] | None = None) -> list[str]:
    return [c.segment.video_id for c in view.search(query, k, videos)]


def test_the_nearest_segment_comes_first_with_its_cosine() -> None:
    view = IndexView(DIM)
    view.apply(row(i, f"v{i}") for i in range(1, 50))
    hits = view.search(7 * vector(20), 3)
    assert hits[0].segment.video_id == "v20"
    assert abs(hits[0].score - 1) < 1e-3
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)


def test_a_tombstone_hides_a_video_and_a_new_upload_shows_again() -> None:
    view = IndexView(DIM)
    view.apply([row(1, "a"), row(2, "a", ordinal=1), row(3, "b"), tombstone(4, "a")])
    assert set(found(view, vector(1))) == {"b"}
    assert (len(view), view.videos, view.last_seq) == (1, 1, 4)
    view.apply([row(5, "c", seed=1)])
    assert found(view, vector(1))[0] == "c"


def test_rows_seen_before_are_passed_over() -> None:
    view = IndexView(DIM)
    rows = [row(1, "a"), row(2, "b")]
    view.apply(rows)
    view.apply(rows)
    assert len(view) == 2


def test_only_allowed_videos_are_found_even_when_they_are_far() -> None:
    view = IndexView(DIM)
    view.apply(row(i, f"v{i}") for i in range(1, 200))
    assert found(view, vector(5), 10, {"v150", "gone"}) == ["v150"]
    assert found(view, vector(5), 10, set()) == []


def test_an_empty_view_and_a_zero_query_find_nothing() -> None:
    view = IndexView(DIM)
    assert view.search(vector(1), 5) == []
    view.apply([row(1, "a")])
    assert view.search(np.zeros(DIM, np.float32), 5) == []


def test_searches_and_appends_of_many_threads_do_not_mix() -> None:
    view = IndexView(DIM)
    view.apply([row(1, "v1")])
    errors: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(200):
                assert view.search(vector(1), 5)[0].segment.video_id == "v1"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(2, 300):
        view.apply([row(i, f"v{i}")])
    for thread in threads:
        thread.join()
    assert not errors
    assert len(view) == 299


def test_rescoring_is_the_exact_q_score() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=DIM).astype(np.float32)
    frames = [3 * rng.normal(size=(count, DIM)).astype(np.float16) for count in (12, 12, 1, 5)]
    expected = [
        float(q_score(torch.from_numpy(query)[None], torch.from_numpy(f.astype(np.float32))[None], TEMPERATURE)) for f in frames
    ]
    np.testing.assert_allclose(rescore(query, [f.tobytes() for f in frames], TEMPERATURE), expected, atol=1e-5)
