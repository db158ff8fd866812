import threading
import time

import numpy as np
import pytest

from indexer import index
from indexer.index import IndexView, StaleView

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
    assert (len(view), view.videos, view.tip) == (1, 1, (4, "a"))
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


# --- large views


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """(count, DIM) unit vectors in clusters, ten to a cluster, in float16."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(60, DIM))
    vectors = centres[rng.integers(60, size=count)] + 0.4 * rng.normal(size=(count, DIM))
    unit: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    return unit


def rows_of(vectors: np.ndarray, first: int = 1) -> list[dict[str, object]]:
    """A row for each vector, two segments a video."""
    facts = [(first + i, f"v{first + i - i % 2}", i % 2, 0.0, 1.0, v.tobytes()) for i, v in enumerate(vectors)]
    return [dict(zip(("seq", "video_id", "ordinal", "start", "end", "pooled"), values, strict=True)) for values in facts]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> tuple[IndexView, np.ndarray]:
    """An approximate view of 4,000 segments that reads an eighth of its lists, and its vectors, row i in seq i + 1."""
    monkeypatch.setattr(index, "LARGE", 3000 * DIM)
    monkeypatch.setattr(index, "PROBES", 16)
    vectors = clustered(4000)
    view = IndexView(DIM)
    view.apply(rows_of(vectors))
    assert view.due == "settle" and not view.approximate
    flat = view.bytes
    view.settle()
    assert view.due is None and view.approximate and view.bytes < flat
    return view, vectors


def recall(view: IndexView, vectors: np.ndarray, alive: np.ndarray, k: int, videos: set[str] | None = None) -> float:
    """The share of the true nearest k of the rows in `alive` that the view finds; it must find k, of these rows only."""
    shares = []
    for query in clustered(40, seed=7).astype(np.float32):
        scores = vectors[alive].astype(np.float32) @ query
        nearest = set((alive[np.argsort(-scores)[:k]] + 1).tolist())
        hits = view.search(query, k, videos)
        seqs = {hit.seq for hit in hits}
        assert len(hits) == len(seqs) == min(k, len(alive)) and seqs <= set((alive + 1).tolist())
        for hit in hits:
            assert hit.score == pytest.approx(float(vectors[hit.seq - 1].astype(np.float32) @ query), abs=0.02)
        shares.append(len(seqs & nearest) / len(nearest))
    return float(np.mean(shares))


def test_a_large_view_finds_nearly_all_of_the_nearest(large: tuple[IndexView, np.ndarray]) -> None:
    view, vectors = large
    assert recall(view, vectors, np.arange(4000), 50) > 0.95
    hits = view.search(vectors[1234].astype(np.float32), 1)
    assert (hits[0].seq, hits[0].segment) == (1235, index.Segment("v1235", 0, 0.0, 1.0))


@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_a_filter_gets_its_k_from_a_large_view_and_few_allowed_are_all_read(
    large: tuple[IndexView, np.ndarray], share: float
) -> None:
    view, vectors = large
    videos = {f"v{i}" for i in range(1, 1 + round(4000 * share), 2)}
    allowed = np.arange(round(4000 * share))
    assert recall(view, vectors, allowed, 30, videos) > 0.95
    if share == 0.01:
        assert recall(view, vectors, allowed, 40, videos) == 1


def test_k_are_found_even_where_the_nearest_lists_hold_none_that_is_allowed(large: tuple[IndexView, np.ndarray]) -> None:
    view, vectors = large
    query = vectors[0].astype(np.float32)
    far = np.argsort(vectors.astype(np.float32) @ query)[:2400]
    videos = {f"v{i + 1 - i % 2}" for i in far.tolist()}
    assert len(view.search(query, 2000, videos)) == 2000


def test_a_large_view_goes_on_without_training(large: tuple[IndexView, np.ndarray]) -> None:
    """Rows that come later are found, rows that are deleted are not; in the end it asks to be rebuilt."""
    view, vectors = large
    later = clustered(1000, seed=3)
    view.apply(rows_of(later, first=4001))
    vectors = np.concatenate([vectors, later])
    assert recall(view, vectors, np.arange(5000), 50) > 0.95
    dead = np.arange(0, 1600)
    view.apply([tombstone(5001 + n, f"v{i + 1}") for n, i in enumerate(dead[::2].tolist())])
    assert (len(view), view.videos, view.due) == (3400, 1700, None)
    assert recall(view, vectors, np.arange(1600, 5000), 50) > 0.95
    view.apply([tombstone(6001 + n, f"v{i + 1}") for n, i in enumerate(range(1600, 1700, 2))])
    assert view.due == "rebuild", "a third is dead"


def test_a_view_that_has_outgrown_its_lists_is_rebuilt(large: tuple[IndexView, np.ndarray]) -> None:
    view, _ = large
    view.apply(rows_of(clustered(4000, seed=4), first=4001))
    assert view.due is None
    view.apply(rows_of(clustered(2, seed=5), first=8001))
    assert view.due == "rebuild"


def test_a_few_dead_rows_are_no_reason_to_rebuild_a_small_view() -> None:
    view = IndexView(DIM)
    view.apply([*rows_of(clustered(1024)), *(tombstone(2000 + i, f"v{i}") for i in range(1, 1025, 2))])
    assert (len(view), view.due) == (0, None)
    assert view.search(vector(1), 5) == []
    view.apply([row(5000, "a"), tombstone(5001, "a")])
    assert view.due == "rebuild"


def test_searches_and_appends_go_on_while_a_view_is_made_approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LARGE", 3000 * DIM)
    monkeypatch.setattr(index, "CHUNK", 64)
    view, vectors = IndexView(DIM), clustered(20_000)
    view.apply(rows_of(vectors))
    query = vectors[10].astype(np.float32)
    settling = threading.Thread(target=view.settle)
    settling.start()
    seq, slowest = 20_001, 0.0
    while settling.is_alive():
        started = time.perf_counter()
        view.apply([row(seq, f"new {seq}"), row(seq + 1, f"gone {seq}"), tombstone(seq + 2, f"gone {seq}")])
        assert view.search(query, 3)[0].seq == 11
        slowest = max(slowest, time.perf_counter() - started)
        seq += 3
    assert view.approximate and slowest < 0.5
    assert len(view) == 20_000 + (seq - 20_001) // 3 > 20_000
    assert {c.segment.video_id for c in view.search(query, 30_000)} == {f"v{i}" for i in range(1, 20_000, 2)} | {
        f"new {i}" for i in range(20_001, seq, 3)
    }


def test_a_video_that_comes_twice_is_a_sign_of_another_table() -> None:
    view = IndexView(DIM)
    view.apply([row(1, "a"), row(2, "a", ordinal=1), row(3, "b"), tombstone(4, "b"), row(5, "b")])
    with pytest.raises(StaleView):
        view.apply([row(6, "a")])


def test_a_view_counts_what_the_table_must_hold() -> None:
    view = IndexView(DIM)
    view.apply([row(1, "c"), row(2, "c", ordinal=1), row(4, "b"), tombstone(6, "c"), row(7, "a")])
    assert view.tally == (3, 4 + 6 + 7, "c")


def test_a_small_view_is_small() -> None:
    view = IndexView(512)
    view.apply(
        {"seq": i, "video_id": f"v{i}", "ordinal": 0, "start": 0.0, "end": 1.0, "pooled": bytes(1024)} for i in range(1, 4)
    )
    assert view.bytes < 12_000
