"""fsck: each kind of damage is found under its code, mended where that can be, and not found again."""

import itertools
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from house import House
from serving import clip
from sqlalchemy import delete as delete_from
from sqlalchemy import insert, update
from typer.testing import CliRunner

from service.adapters import adapter_rows
from service.cli.main import app
from service.search.query import Searcher
from service.storage import collection_rows
from service.storage.blobs import adapter_key, frames_key, thumbnail_key, video_key
from service.storage.collection_rows import Collection
from service.storage.tables import captions, collections, generations, segments, tasks
from service.upkeep import delete
from service.upkeep.fsck import Fsck
from service.upkeep.fsck_videos import Finding
from service.videos import index, video_rows
from service.videos.video_rows import Video

numbers = itertools.count(1)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("house") / "data") as made:
        yield made


@pytest.fixture
def films(house: House) -> Iterator[Collection]:
    """Two ready clips, one of two segments, searched with an adapter; sound again when the test has ended."""
    seed = next(numbers)
    made = house.add_collection(f"films-{seed}", segment_seconds=1.0)
    for number in range(2):
        house.add_video(made, number, 1.0 + number)
    house.add_adapter(made, seed)
    assert found(house) == []
    yield made
    with house.storage.database.write() as connection:
        collection_rows.mark_collection_deleted(connection, house.tenant.id, made.id)


def found(house: House, repair: bool = False, deep: bool = False) -> list[Finding]:
    return list(Fsck(house.storage, house.encoder, house.decoders, deep).run(repair=repair))


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def one(house: House, films: Collection) -> Video:
    """The clip of two segments."""
    return house.videos(films.name)["clip-1.mp4"]


def rounded(house: House, films: Collection) -> list[tuple[str, int, float]]:
    return [(name, segment, round(score, 4)) for name, segment, score in house.scores(films.name)]


Damage = Callable[[House, Collection, Video], None]


def lose_frames(house: House, films: Collection, video: Video) -> None:
    house.storage.blobs.delete(frames_key(films.id, video.id))


def flip_a_bit_of_the_frames(house: House, films: Collection, video: Video) -> None:
    data = bytearray(house.storage.blobs.get(frames_key(films.id, video.id)))
    data[len(data) // 2] ^= 1
    house.storage.blobs.put(frames_key(films.id, video.id), bytes(data))


def take_the_frames_of_another(house: House, films: Collection, video: Video) -> None:
    """Readable, but of one segment where there should be two."""
    other = house.videos(films.name)["clip-0.mp4"]
    house.storage.blobs.put(frames_key(films.id, video.id), house.storage.blobs.get(frames_key(films.id, other.id)))


def lose_a_thumbnail(house: House, films: Collection, video: Video) -> None:
    house.storage.blobs.delete(thumbnail_key(films.id, video.id, 1))


def active_set(house: House, films: Collection) -> str:
    with house.storage.database.read() as connection:
        return collection_rows.active_generation(connection, house.tenant.id, films.name)[1].vector_set


def lose_vectors(house: House, films: Collection, video: Video) -> None:
    with house.storage.database.write() as connection:
        connection.execute(delete_from(segments).where(segments.c.video_id == video.id))


def in_vectors(**values: bytes) -> Damage:
    def damage(house: House, films: Collection, video: Video) -> None:
        with house.storage.database.write() as connection:
            mine = (segments.c.video_id == video.id, segments.c.ordinal == 1)
            connection.execute(update(segments).where(*mine).values(**values))

    return damage


def lose_a_segment(house: House, films: Collection, video: Video) -> None:
    with house.storage.database.write() as connection:
        connection.execute(delete_from(segments).where(segments.c.video_id == video.id, segments.c.ordinal == 0))


NAN = np.full(128, np.nan, np.float16).tobytes()


@pytest.mark.parametrize(
    ("damage", "code", "times"),
    [
        (lose_frames, "frames_missing", 1),
        (flip_a_bit_of_the_frames, "frames_damaged", 1),
        (take_the_frames_of_another, "frames_damaged", 1),
        (lose_a_thumbnail, "thumbnails_missing", 1),
        (lose_vectors, "vectors_missing", 1),  # a retired generation may lack them
        (lose_a_segment, "vectors_damaged", 2),  # of the generation in use and of the retired one
        (in_vectors(pooled=NAN), "vectors_damaged", 2),
        (in_vectors(frames=NAN), "vectors_damaged", 2),
        (in_vectors(pooled=bytes(10)), "vectors_damaged", 2),
        (in_vectors(frames=b""), "vectors_damaged", 2),
    ],
)
def test_what_can_be_made_again_is_made_again(house: House, films: Collection, damage: Damage, code: str, times: int) -> None:
    before = rounded(house, films)
    with closing(Searcher(house.storage, house.encoder)) as searcher:  # as in a service that runs on
        searcher.search(house.tenant.id, films.name, "a red ball", group_by="segment")
        damage(house, films, one(house, films))
        reported = found(house)
        assert codes(reported) == [code] * times
        assert all(finding.mend and finding.outcome is None for finding in reported)
        assert [finding.outcome for finding in found(house, repair=True)] == ["repaired"] * times
        assert found(house, repair=True, deep=True) == [], "nothing is left"
        assert rounded(house, films) == before
        hits = searcher.search(house.tenant.id, films.name, "a red ball", group_by="segment").hits
        assert [(hit.video.filename, hit.segment, round(hit.score, 4)) for hit in hits] == before


def test_without_frames_and_file_nothing_can_be_made_again(house: House, films: Collection) -> None:
    video = one(house, films)
    lose_frames(house, films, video)
    lose_vectors(house, films, video)
    house.storage.blobs.delete(video_key(films.id, video.id))
    reported = found(house, repair=True)
    assert codes(reported) == ["file_missing", "frames_missing", "vectors_missing"]
    assert all(finding.mend is None and finding.outcome is None for finding in reported)
    upload = house.storage.settings.scratch / "upload"
    upload.write_bytes(clip(1, 2.0))
    assert index.restore_file(house.storage, video, upload)
    assert [finding.outcome for finding in found(house, repair=True)] == ["repaired", "repaired"]
    assert found(house) == []


def test_a_stored_file_is_read_against_its_sha256_where_that_is_asked_for(house: House, films: Collection) -> None:
    video = one(house, films)
    key = video_key(films.id, video.id)
    data = house.storage.blobs.get(key)
    house.storage.blobs.put(key, bytes([data[0] ^ 1]) + data[1:])
    assert found(house) == []
    (finding,) = found(house, deep=True)
    assert (finding.code, finding.mend) == ("file_damaged", None)
    house.storage.blobs.put(key, data[:-1])
    assert codes(found(house)) == ["file_damaged"], "its size alone tells"


def test_a_video_that_was_imported_without_its_file_is_sound(house: House, films: Collection) -> None:
    video = one(house, films)
    house.storage.blobs.delete(video_key(films.id, video.id))
    with house.storage.database.write() as connection:
        video_rows.set_video(connection, house.tenant.id, video.id, media={**(video.media or {}), "stored": False})
    assert found(house) == []
    lose_frames(house, films, video)
    assert [finding.mend for finding in found(house)] == [None], "there is nothing to decode"


def test_an_adapter_comes_back_from_a_copy_or_is_told(house: House, films: Collection) -> None:
    with house.storage.database.read() as connection:
        (version,) = adapter_rows.adapters_of(connection, house.tenant.id, films.id)
    key = adapter_key(films.id, version.digest)
    data = house.storage.blobs.get(key)
    house.storage.blobs.put(key, data[:-4] + bytes(4))
    (finding,) = found(house, repair=True)
    assert (finding.code, finding.mend, finding.outcome) == ("adapter_damaged", None, None)
    house.storage.blobs.delete(key)
    assert codes(found(house)) == ["adapter_missing"]
    copy = house.add_collection(f"copy-{films.name}")
    with house.storage.database.write() as connection:
        adapter_rows.add_adapter(connection, house.tenant.id, copy.id, version.manifest)
    house.storage.blobs.put(adapter_key(copy.id, version.digest), data)
    assert [finding.outcome for finding in found(house, repair=True)] == ["repaired"]
    assert house.storage.blobs.get(key) == data


@pytest.mark.parametrize("pointer", [None, "gen_gone"])
def test_searches_use_one_active_generation(house: House, films: Collection, pointer: str | None) -> None:
    before = house.scores(films.name)
    with house.storage.database.write() as connection:
        if pointer is None:  # two are active
            connection.execute(update(generations).where(generations.c.collection_id == films.id).values(state="active"))
        else:
            connection.execute(update(collections).where(collections.c.id == films.id).values(active_generation_id=pointer))
    assert codes(found(house)) == ["active_generation_wrong"]
    assert [finding.outcome for finding in found(house, repair=True)] == ["repaired"]
    assert found(house) == []
    assert house.scores(films.name) == before


def test_a_collection_without_any_generation_is_searched_with_the_frozen_backbone(house: House, films: Collection) -> None:
    with house.storage.database.write() as connection:
        connection.execute(delete_from(generations).where(generations.c.collection_id == films.id))
    reported = found(house, repair=True)
    assert codes(reported) == ["vectors_of_nothing", "vectors_of_nothing", "active_generation_wrong"]
    assert {finding.outcome for finding in reported} == {"repaired"}
    assert found(house) == []
    assert len(house.scores(films.name)) == 3


def test_a_video_that_nothing_works_on_is_indexed(house: House, films: Collection) -> None:
    video = house.add_video(films, 2, index=False)
    assert found(house) == [], "its task is waiting"
    with house.storage.database.write() as connection:
        connection.execute(delete_from(tasks).where(tasks.c.id == video.task_id))
    assert codes(found(house)) == ["video_abandoned"]
    assert [finding.outcome for finding in found(house, repair=True)] == ["repaired"]
    assert house.video(video.id).status == "ready" and found(house) == []


def test_rows_and_files_of_nothing_go(house: House, films: Collection) -> None:
    vectors = active_set(house, films)
    row = {"ordinal": 0, "start": 0.0, "end": 1.0, "pooled": bytes(256), "frames": bytes(256)}
    with house.storage.database.write() as connection:
        for vector_set in (vectors, "gen_none"):
            connection.execute(insert(segments).values(vector_set=vector_set, video_id="vid_none", **row))
    files = {key for kind in ("videos", "frames") for key in house.storage.blobs.keys(f"{kind}/{films.id}/")}
    for kind, age in (("videos", 7200), ("frames", 7200), ("videos", 0)):
        key = f"{kind}/{films.id}/vid_none-{age}"
        house.storage.blobs.put(key, b"x")
        path = house.storage.settings.data / "blobs" / key
        os.utime(path, (time.time() - age,) * 2)
    reported = found(house)
    assert sorted(codes(reported)) == ["blob_of_nothing", "blob_of_nothing", "vectors_of_nothing", "vectors_of_nothing"]
    assert {finding.outcome for finding in found(house, repair=True)} == {"repaired"}
    assert found(house) == []
    left = {key for kind in ("videos", "frames") for key in house.storage.blobs.keys(f"{kind}/{films.id}/")}
    assert left - files == {f"videos/{films.id}/vid_none-0"}, "what may still be under way is left"
    assert len(house.scores(films.name)) == 3


def test_captions_without_a_video_go(house: House, films: Collection) -> None:
    raw = house.storage.database.engine.raw_connection()
    raw.execute("PRAGMA foreign_keys=OFF")
    raw.execute("INSERT INTO captions (id, video_id, position, text) VALUES ('cap_x', 'vid_none', 0, 'x')")
    raw.execute("PRAGMA foreign_keys=ON")
    raw.close()
    assert codes(found(house)) == ["captions_of_nothing"]
    assert [finding.outcome for finding in found(house, repair=True)] == ["repaired"]
    assert found(house) == []
    with house.storage.database.read() as connection:
        assert connection.execute(captions.select().where(captions.c.video_id == "vid_none")).first() is None


def test_a_damaged_database_is_told(tmp_path: Path) -> None:
    with House(tmp_path / "data") as house:
        house.add_video(house.add_collection("films"), 0)
    file = tmp_path / "data" / "polyclip.sqlite"
    with closing(sqlite3.connect(file)) as raw:
        (page,) = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_videos_status'").fetchone()
        (size,) = raw.execute("PRAGMA page_size").fetchone()
    with file.open("r+b") as database:
        database.seek((page - 1) * size)
        database.write(bytes(size))
    done = CliRunner().invoke(app, ["fsck", "--data", str(tmp_path / "data"), "--json"])
    assert done.exit_code == 1
    assert {finding["code"] for finding in json.loads(done.stdout)["findings"]} == {"database_damaged"}


def test_a_video_that_is_deleted_while_it_is_looked_at_is_no_finding(house: House, films: Collection) -> None:
    video = one(house, films)

    def delete_it(note: str) -> None:
        if note.startswith(f"default/{films.name}, ") and lost:
            with house.storage.database.write() as connection:
                delete.delete_video(connection, house.tenant.id, films.id, video.id)
            lost.clear()

    lost = [lose_frames(house, films, video)]  # type: ignore[func-returns-value]
    assert list(Fsck(house.storage, house.encoder, house.decoders, tell=delete_it).run()) == []
    assert not lost


def test_the_command_tells_a_line_for_each_finding_and_its_status(tmp_path: Path) -> None:
    run, data = CliRunner(), ["--data", str(tmp_path / "data")]
    with House(tmp_path / "data") as house:
        films = house.add_collection("films")
        video = house.add_video(films, 0)
        house.add_collection("others")
        done = run.invoke(app, ["fsck", *data])
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines() == ["healthy: 2 collections, 1 videos, 0 adapters checked"]
        lose_frames(house, films, video)
        done = run.invoke(app, ["fsck", *data])
        assert done.exit_code == 1
        assert done.stdout.splitlines()[0].startswith(f"frames_missing: video {video.id}: ")
        done = run.invoke(app, ["fsck", "--collection", "others", "--json", *data])
        assert json.loads(done.stdout) == {
            "healthy": True, "checked": {"collections": 1, "videos": 0, "adapters": 0}, "findings": [],
        }  # fmt: skip
        done = run.invoke(app, ["fsck", "--collection", "films", "--repair", "--json", *data])
        assert done.exit_code == 0
        (finding,) = json.loads(done.stdout)["findings"]
        assert (finding["code"], finding["repairable"], finding["outcome"]) == ("frames_missing", True, "repaired")
        assert run.invoke(app, ["fsck", "--collection", "nothing", *data]).exit_code == 1
        assert run.invoke(app, ["fsck", "--nonsense", *data]).exit_code == 2
