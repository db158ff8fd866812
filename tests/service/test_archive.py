"""A collection as one file: it answers elsewhere as it did here; what is wrong with a file is found before anything is kept."""

import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from house import House
from serving import ROOT_KEY, Server, Tenant, clip, new_tenant
from starlette.testclient import TestClient
from typer.testing import CliRunner
from workshop import decoders_of, runner

import backbone
from service.adapters import adapter_rows
from service.app import create_app
from service.cli.main import app
from service.jobs import task_rows
from service.settings import Settings
from service.storage import collection_rows, tenant_rows
from service.storage.blobs import frames_key, thumbnail_key, video_key
from service.storage.rows import AlreadyExists, InvalidName, NotFound, QuotaExceeded
from service.upkeep import archive_rows, delete, export_collection, import_collection
from service.upkeep.archive import Archive, InvalidArchive, Writer
from service.upkeep.import_collection import ArchiveOfOtherBackbone
from service.videos import index
from training.progress import unheard


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A collection of four clips, one of two segments, with two adapters, the second in use."""
    with House(tmp_path_factory.mktemp("house") / "data") as made:
        films = made.add_collection("films", segment_seconds=1.0, description="Füchse")
        videos = [made.add_video(films, number, 2.0 if number == 3 else 1.0) for number in range(4)]
        made.add_adapter(films, 1)
        made.add_adapter(films, 2, held_out=[videos[0].id, videos[2].id])
        yield made


@pytest.fixture(scope="module")
def archive(house: House, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(house, tmp_path_factory.mktemp("archives") / "films.tar")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Another installation."""
    with House(tmp_path_factory.mktemp("other") / "data", "acme") as made:
        yield made


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Other installations, with either kind of database."""
    url = None if request.param == "sqlite" else request.getfixturevalue("postgres")
    with House(tmp_path_factory.mktemp("there") / "data", f"on-{request.param}", database_url=url) as made:
        yield made


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of another backbone of the built-in shape."""
    tensors = safetensors.numpy.load_file(Path(backbone.__file__).parent / "weights" / "builtin.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    file = tmp_path_factory.mktemp("weights") / "other.safetensors"
    safetensors.numpy.save_file({**tensors, name: tensors[name][::-1].copy()}, file)
    return str(file)


def exported(house: House, to: Path, name: str = "films", files: bool = True, **more: Any) -> Path:
    with to.open("wb") as file:
        file.writelines(export_collection.Export(house.storage, house.tenant.id, name, files, **more).chunks())
    return to


def taken(house: House, archive: Path, name: str, **more: Any) -> import_collection.Imported:
    return import_collection.import_archive(
        house.storage, house.encoder, house.decoders, more.pop("tenant", house.tenant), archive, name=name, **more
    )


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def sealed(to: Path, contents: dict[str, bytes]) -> Path:
    """An archive of these members with checksums that are right."""
    with to.open("wb") as file, tempfile.TemporaryFile() as sums:
        writer = Writer(sums, 0)
        for name, data in contents.items():
            if name != "SHA256SUMS":
                file.writelines(writer.whole(name, data))
        file.writelines(writer.end())
    return to


def rounded(scores: list[tuple[str, int, float]]) -> list[tuple[str, int, float]]:
    return [(name, segment, round(score, 5)) for name, segment, score in scores]


def test_a_collection_answers_elsewhere_as_it_did_here(house: House, other: House, archive: Path) -> None:
    done = taken(other, archive, "moved")
    assert (done.videos, done.queued, done.adapters, done.left_out) == (4, [], 2, [])
    assert len(other.scores("moved")) == 5
    assert other.scores("moved") == house.scores("films"), "the same scores, bit by bit"
    here, there = house.videos("films"), other.videos("moved")
    assert here.keys() == there.keys() and not {v.id for v in here.values()} & {v.id for v in there.values()}
    for name, video in here.items():
        moved = there[name]
        for fact in ("sha256", "size", "status", "media", "metadata", "created_at"):
            assert getattr(moved, fact) == getattr(video, fact)
        assert other.captions(moved) == house.captions(video)
        for key in (video_key, frames_key):
            assert other.storage.blobs.get(key(moved.collection_id, moved.id)) == house.storage.blobs.get(
                key(video.collection_id, video.id)
            )
        first = house.storage.blobs.get(thumbnail_key(video.collection_id, video.id, 0))
        assert other.storage.blobs.get(thumbnail_key(moved.collection_id, moved.id, 0)) == first
    assert other.collection("moved").settings == house.collection("films").settings


def test_a_collection_comes_back_from_another_house_as_it_went(
    house: House, other: House, there: House, archive: Path, tmp_path: Path
) -> None:
    taken(there, archive, "guest")
    assert rounded(there.scores("guest")) == rounded(house.scores("films"))
    taken(other, exported(there, tmp_path / "back.tar", "guest"), back := f"back-{there.tenant.name}")
    assert other.scores(back) == house.scores("films")
    assert {v.sha256 for v in other.videos(back).values()} == {v.sha256 for v in house.videos("films").values()}
    first = {name: there.captions(video) for name, video in there.videos("guest").items()}
    assert {name: other.captions(video) for name, video in other.videos(back).items()} == first
    there.add_video(there.collection("guest"), 30)
    assert len(there.scores("guest")) == 6, "and it lives on there"


def test_adapters_keep_their_digests_and_name_their_videos_by_the_new_ids(house: House, other: House, archive: Path) -> None:
    done = taken(other, archive, "adapters")
    with house.storage.database.read() as connection:
        here = adapter_rows.adapters_of(connection, house.tenant.id, house.collection("films").id)
    with other.storage.database.read() as connection:
        there = adapter_rows.adapters_of(connection, other.tenant.id, done.collection_id)
    facts = ("version", "digest", "created_at")
    assert [[getattr(v, f) for f in facts] for v in there] == [[getattr(v, f) for f in facts] for v in here]
    videos = other.videos("adapters")
    held_out = [videos["clip-0.mp4"].id, videos["clip-2.mp4"].id]
    assert there[1].manifest["data"]["validation_videos"] == sorted(held_out)
    assert (there[1].manifest["recipe"], there[1].manifest["words"]) == ({"seed": 2}, ["kilo"])
    assert other.activate(other.collection("adapters"), there[0].id) == 4, "the first one's vectors were left behind"


def test_the_vectors_of_retired_generations_come_along_if_asked_for(house: House, other: House, tmp_path: Path) -> None:
    taken(other, exported(house, tmp_path / "all.tar", every_generation=True), "all")
    collection = other.collection("all")
    with other.storage.database.read() as connection:
        first, _ = adapter_rows.adapters_of(connection, other.tenant.id, collection.id)
    assert other.activate(collection, first.id) == 0
    assert other.activate(collection, None) == 0


def test_an_adapter_of_the_text_tower_brings_the_vectors_that_it_searches(house: House, other: House, tmp_path: Path) -> None:
    texts = house.add_collection("texts")
    house.add_video(texts, 5)
    house.add_adapter(texts, 3, scope="text")
    taken(other, exported(house, tmp_path / "texts.tar", "texts"), "texts")
    assert other.scores("texts") == house.scores("texts")
    assert other.activate(other.collection("texts"), None) == 0


def test_another_tenant_of_the_same_house_may_have_the_same_name(house: House, archive: Path) -> None:
    neighbour = house.add_tenant("neighbour")
    taken(house, archive, "films", tenant=neighbour)
    assert house.scores("films", neighbour) == house.scores("films")
    before = house.inventory()
    with pytest.raises(AlreadyExists):
        taken(house, archive, "films", tenant=neighbour)
    with pytest.raises(InvalidName):
        taken(house, archive, "../films", tenant=neighbour)
    assert house.inventory() == before


def test_standard_tools_read_an_archive(archive: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "xf", archive, "-C", tmp_path], check=True)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == "polyclip-archive/1" and manifest["videos"] == 4
    videos = [json.loads(path.read_text()) for path in tmp_path.glob("videos/*/video.json")]
    assert sorted(video["metadata"]["number"] for video in videos) == [0, 1, 2, 3]
    (vectors,) = tmp_path.glob(f"videos/{videos[0]['id']}/vectors/*.safetensors")
    assert safetensors.numpy.load_file(vectors)["pooled"].dtype == np.float16


def test_without_files_all_else_works_and_an_upload_brings_one_back(house: House, other: House, tmp_path: Path) -> None:
    small = exported(house, tmp_path / "small.tar", files=False)
    assert not any(name.endswith("/file") for name in members(small))
    taken(other, small, "small")
    assert other.scores("small") == house.scores("films")
    assert all(video.media and video.media["stored"] is False for video in other.videos("small").values())
    assert other.activate(other.collection("small"), None) == 4, "embedded anew, from the frames"
    again = export_collection.Export(other.storage, other.tenant.id, "small", files=True)
    assert len(members_of(again, tmp_path)) == 4 and again.left_out["damaged"] == []
    video = other.videos("small")["clip-1.mp4"]
    (tmp_path / "data").write_bytes(clip(1))
    assert index.restore_file(other.storage, video, tmp_path / "data")
    assert "stored" not in (other.videos("small")["clip-1.mp4"].media or {})


def test_what_is_unfinished_goes_along_with_its_file_and_is_indexed_there(house: House, other: House, tmp_path: Path) -> None:
    drafts = house.add_collection("drafts")
    waiting, broken = house.add_video(drafts, 6, index=False), house.add_video(drafts, 7)
    index.fail_video(house.storage, house.tenant.id, broken.id, "no_frames", "nothing to be seen")
    out = export_collection.Export(house.storage, house.tenant.id, "drafts", files=False)
    assert members_of(out, tmp_path) == []
    assert (out.left_out["failed"], out.left_out["unfinished"]) == ([broken.id], [waiting.id])
    (video,) = taken(other, exported(house, tmp_path / "drafts.tar", "drafts"), "drafts").queued
    assert video.status == "pending"
    index.index_video(other.storage, other.encoder, other.decoders, other.tenant.id, video.id)
    assert [name for name, _, _ in other.scores("drafts")] == ["clip-6.mp4"]
    with other.storage.database.read() as connection:
        assert task_rows.task(connection, other.tenant.id, video.task_id).status == "succeeded"


def members_of(out: export_collection.Export, folder: Path) -> list[str]:
    """The videos in an export."""
    (folder / "out.tar").write_bytes(b"".join(out.chunks()))
    return [name.split("/")[1] for name in members(folder / "out.tar") if name.endswith("/video.json")]


def test_a_video_that_is_deleted_during_an_export_is_left_out_and_named(house: House, tmp_path: Path) -> None:
    going = house.add_collection("going")
    first, second = house.add_video(going, 8), house.add_video(going, 9)
    out = export_collection.Export(house.storage, house.tenant.id, "going", files=True)
    with house.storage.database.write() as connection:
        delete.delete_video(connection, house.tenant.id, going.id, second.id)
    delete.purge_video(house.storage, house.tenant.id, going.id, second.id)
    assert members_of(out, tmp_path) == [first.id]
    assert out.left_out["deleted"] == [second.id]
    assert json.loads(members(tmp_path / "out.tar")["contents.json"])["left_out"]["deleted"] == [second.id]


def test_what_is_damaged_is_named_and_made_again_where_it_arrives(house: House, other: House, tmp_path: Path) -> None:
    worn = house.add_collection("worn")
    frameless, fileless = house.add_video(worn, 10), house.add_video(worn, 11)
    house.storage.blobs.delete(frames_key(worn.id, frameless.id))
    house.storage.blobs.delete(video_key(worn.id, fileless.id))
    out = export_collection.Export(house.storage, house.tenant.id, "worn", files=True)
    assert sorted(members_of(out, tmp_path)) == sorted([frameless.id, fileless.id])
    assert sorted(out.left_out["damaged"]) == sorted([frameless.id, fileless.id])
    (queued,) = taken(other, tmp_path / "out.tar", "worn").queued
    index.index_video(other.storage, other.encoder, other.decoders, other.tenant.id, queued.id)
    assert rounded(other.scores("worn")) == rounded(house.scores("worn"))


def test_an_archive_of_another_backbone_is_refused_or_embedded_anew_without_adapters(
    archive: Path, weights: str, tmp_path: Path
) -> None:
    with House(tmp_path / "data", backbone="builtin", pretrained=weights) as strange:
        assert strange.encoder.backbone.image_size == 64
        before = strange.inventory()
        with pytest.raises(ArchiveOfOtherBackbone):
            taken(strange, archive, "films")
        assert strange.inventory() == before
        done = taken(strange, archive, "films", re_embed=True)
        assert (len(done.queued), done.adapters, len(done.left_out)) == (4, 0, 2)
        assert {video.status for video in done.queued} == {"queued"}
        for video in done.queued:
            index.index_video(strange.storage, strange.encoder, strange.decoders, strange.tenant.id, video.id)
        assert len(strange.scores("films")) == 5


def test_quotas_hold_and_leave_nothing_behind(other: House, archive: Path) -> None:
    for quotas in ({"max_videos": 3}, {"max_bytes": 100}, {"max_collections": 0}):
        poor = other.add_tenant(f"poor-{next(iter(quotas)).replace('_', '-')}", **quotas)
        before = other.inventory()
        with pytest.raises(QuotaExceeded):
            taken(other, archive, "films", tenant=poor)
        assert other.inventory() == before


def test_an_import_that_dies_is_seen_by_nobody_and_swept_away(
    there: House, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9: no clean-up of the import's own runs."""
    before = there.inventory()
    with monkeypatch.context() as patch:
        patch.setattr(delete, "purge_collection", lambda *_: None)
        patch.setattr(archive_rows, "reveal", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            taken(there, archive, "dying")
    assert there.inventory()[0]["segments"] > before[0]["segments"]
    with pytest.raises(NotFound):
        there.scores("dying")
    with there.storage.database.read() as connection:
        assert tenant_rows.usage(connection, there.tenant.id)["videos"] == sum(len(there.videos(c)) for c in names(there))
    delete.sweep(there.storage)
    assert there.inventory() != before, "the sweep leaves what may still be under way"
    delete.sweep(there.storage, grace=0)
    assert there.inventory() == before
    taken(there, archive, "dying")


def names(house: House) -> list[str]:
    with house.storage.database.read() as connection:
        return [collection.name for collection in collection_rows.list_collections(connection, house.tenant.id, 100, None).rows]


# --- hostile files


def truncated(data: bytes) -> Iterator[bytes]:
    yield b""
    yield data[:300]
    yield data[: len(data) // 2]
    yield data[: -3 * 512]
    yield data[:-512]


def linked(data: bytes) -> Iterator[bytes]:
    for kind, name, target in (
        (tarfile.SYMTYPE, "videos/vid_x/file", "/etc/passwd"),
        (tarfile.LNKTYPE, "videos/vid_x/file", "manifest.json"),
        (tarfile.CHRTYPE, "videos/vid_x/file", ""),
        (tarfile.DIRTYPE, "videos/vid_x", ""),
        (tarfile.REGTYPE, "../../evil", ""),
        (tarfile.REGTYPE, "/etc/evil", ""),
        (tarfile.REGTYPE, "videos/../evil/file", ""),
        (tarfile.XHDTYPE, "manifest.json", ""),
        (tarfile.GNUTYPE_LONGNAME, "manifest.json", ""),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        yield data[: -2 * 512] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
        yield info.tobuf(tarfile.GNU_FORMAT) + data


def giant(data: bytes) -> Iterator[bytes]:
    for size in (10**9, 2**62):
        info = tarfile.TarInfo("manifest.json")
        info.size = size
        yield info.tobuf(tarfile.GNU_FORMAT) + data[512:]


def flipped(data: bytes) -> Iterator[bytes]:
    """A bit here and there, in headers, contents and checksums; not in the padding, which is zero."""
    for start in range(3, len(data) - 1024, len(data) // 40):
        position = next(place for place in range(start, len(data)) if data[place])
        yield data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def longer(data: bytes) -> Iterator[bytes]:
    yield data + b"x"
    yield data + data
    yield b"PK\x03\x04" + data


@pytest.mark.parametrize("spoil", [truncated, linked, giant, flipped, longer])
def test_a_torn_or_changed_file_is_refused_before_anything_is_written(
    other: House, archive: Path, tmp_path: Path, spoil: Callable[[bytes], Iterator[bytes]]
) -> None:
    before = other.inventory()
    harmless = 0
    for number, data in enumerate(spoil(archive.read_bytes())):
        (tmp_path / "bad.tar").write_bytes(data)
        try:
            with Archive(tmp_path / "bad.tar") as bad:
                bad.verify(unheard)
        except InvalidArchive:
            with pytest.raises(InvalidArchive):
                taken(other, tmp_path / "bad.tar", f"bad-{number}")
        else:
            harmless += 1
    assert harmless <= 1, "only padding is nobody's"
    assert other.inventory() == before


def test_the_damaged_member_is_named(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    (tmp_path / "bad.tar").write_bytes(data.replace(b"clip-2.mp4", b"clip-9.mp4"))
    with Archive(tmp_path / "bad.tar") as bad, pytest.raises(InvalidArchive, match=r"videos/vid_\w+/video\.json"):
        bad.verify(unheard)


Contents = dict[str, bytes]


def in_json(suffix: str, **values: Any) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        name = next(name for name in contents if name.endswith(suffix))
        contents[name] = json.dumps({**json.loads(contents[name]), **values}).encode()

    return change


def in_vectors(name: str, change: Callable[[Any], Any]) -> Callable[[Contents], None]:
    def apply(contents: Contents) -> None:
        member = next(member for member in contents if "/vectors/" in member)
        tensors = safetensors.numpy.load(contents[member])
        tensors[name] = change(tensors[name])
        contents[member] = safetensors.numpy.save(tensors)

    return apply


def with_nan(array: Any) -> Any:
    array = array.copy()
    array.flat[0] = np.nan
    return array


def instead(suffix: str, data: bytes) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        contents[next(name for name in contents if name.endswith(suffix))] = data

    return change


def bomb(contents: Contents) -> None:
    """Frames that all stand at one place of a small file, or unpack to much more than it."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("index.json", json.dumps({"segments": [{"start": 0, "end": 1, "frames": ["a.jpg"]}]}))
        packed.writestr("a.jpg", b"\xff\xd8\xff" + bytes(10_000_000))
    instead("frames.zip", memory.getvalue())(contents)


def many_frames(segments: int, frames: int) -> Callable[[Contents], None]:
    """Small frames, but more of them than a video of this house could have."""

    def change(contents: Contents) -> None:
        name = next(name for name in contents if name.endswith("/frames.zip"))
        with zipfile.ZipFile(io.BytesIO(contents[name])) as packed:
            jpeg = packed.read(json.loads(packed.read("index.json"))["segments"][0]["frames"][0])
        told = [{"start": n, "end": n + 1, "frames": [f"{n}-{slot}.jpg" for slot in range(frames)]} for n in range(segments)]
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as packed:
            packed.writestr("index.json", json.dumps({"segments": told}))
            for frame in (frame for segment in told for frame in segment["frames"]):  # type: ignore[attr-defined]
                packed.writestr(frame, jpeg)
        contents[name] = memory.getvalue()
        vectors = [member for member in contents if member.startswith(name.removesuffix("frames.zip") + "vectors/")]
        for member in vectors:
            del contents[member]

    return change


def another_adapter(contents: Contents) -> None:
    tensors = [name for name in contents if name.endswith(".safetensors") and name.startswith("adapters/")]
    contents[tensors[0]] = contents[tensors[1]]


def without(suffix: str) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        del contents[next(name for name in contents if name.endswith(suffix))]

    return change


def two_active(contents: Contents) -> None:
    manifest = json.loads(contents["manifest.json"])
    manifest["generations"] = [{**g, "active": True, "vector_set": "gen_x"} for g in manifest["generations"]]
    contents["manifest.json"] = json.dumps(manifest).encode()


MEDIA = {"duration": 1.0, "width": 1, "height": 1, "fps": 1.0, "codec": "x", "container": "x", "frames": 1, "decoder": "x"}


@pytest.mark.parametrize(
    "spoil",
    [
        in_json("manifest.json", format="polyclip-archive/2"),
        in_json("manifest.json", collection={"name": "x", "settings": {"segment_seconds": -1}}),
        in_json("manifest.json", collection={"name": "x", "settings": {"unknown": 1}}),
        in_json("manifest.json", generations=[]),
        in_json("manifest.json", videos="many"),
        two_active,
        in_json("contents.json", videos=3),
        in_json("video.json", sha256="../../x"),
        in_json("video.json", sha256="0" * 64),
        in_json("video.json", size=-1),
        in_json("video.json", size=7),
        in_json("video.json", filename=None),
        in_json("video.json", metadata=[1]),
        in_json("video.json", captions=[{"text": ""}]),
        in_json("video.json", captions=["text"]),
        in_json("video.json", media={**MEDIA, "duration": 1e999}),
        in_json("video.json", media={**MEDIA, "width": "1"}),
        in_json("video.json", media={}),
        instead("video.json", b"[" * 100_000),
        instead("video.json", b'{"size": NaN}'),
        in_vectors("pooled", lambda a: a[:, :-1]),
        in_vectors("pooled", lambda a: (a * 3).astype(a.dtype)),
        in_vectors("pooled", lambda a: a.astype(np.float32)),
        in_vectors("frames", with_nan),
        in_vectors("frames", lambda a: a[:-1]),
        in_vectors("segments", lambda a: a + 1),
        instead("/frames.zip", b"PK\x03\x04nothing"),
        instead("/frames.zip", b""),
        bomb,
        many_frames(segments=1, frames=13),
        many_frames(segments=2001, frames=1),
        instead("/file", b"#!/bin/sh"),
        instead("/file", clip(77)),
        another_adapter,
        in_json("manifest.json", adapters=[{"digest": "../../x", "version": 1, "created_at": ""}]),
        without("/frames.zip"),
        without(".safetensors"),
        without("video.json"),
    ],
)
def test_an_archive_that_is_whole_but_false_leaves_nothing_behind(
    other: House, archive: Path, tmp_path: Path, spoil: Callable[[Contents], None]
) -> None:
    before, contents = other.inventory(), members(archive)
    spoil(contents)
    with pytest.raises(InvalidArchive):
        taken(other, sealed(tmp_path / "false.tar", contents), "false")
    assert other.inventory() == before


def test_a_name_from_an_archive_is_only_a_label(other: House, archive: Path, tmp_path: Path) -> None:
    contents = members(archive)
    in_json("video.json", filename="../../etc/pass\x07wd")(contents)
    taken(other, sealed(tmp_path / "named.tar", contents), "named")
    assert "passwd" in other.videos("named")


# --- over HTTP, and as commands


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = Settings(data=tmp_path_factory.mktemp("http") / "data", root_key=ROOT_KEY, threads=1, max_archive_bytes=300_000)
    with TestClient(create_app(settings)) as running:
        yield running


def work(tenant: Tenant, task: str) -> Any:
    """Runs a task as a worker would; the task."""
    services = tenant.client.app.state.services
    with services.storage.database.read() as connection:
        owner = tenant_rows.tenant_named(connection, tenant.name).id
    runner(services).run(owner, task)
    return tenant.get(f"/tasks/{task}").json()


def test_an_admin_exports_and_imports_over_http(client: Any, archive: Path, tmp_path: Path) -> None:
    tenant, stranger = new_tenant(client), new_tenant(client)
    files = {"file": ("films.tar", archive.read_bytes())}
    answer = tenant.call("POST", "/admin/collections/import", files=files, params={"collection": "here"})
    assert answer.status_code == 202 and answer.json()["collection"] == "here"
    task = work(tenant, answer.json()["task_id"])
    assert task["status"] == "succeeded", task
    assert task["result"]["videos"] == 4
    found = tenant.search("here")["data"]
    assert len(found) == 4
    video = tenant.get(f"/collections/here/videos/{found[0]['video_id']}").json()
    assert tenant.get(f"/tasks/{video['task_id']}").json()["status"] == "succeeded"
    assert client.get(found[0]["video_url"]).status_code == 200
    assert client.app.state.services.storage.blobs.keys("imports/") == [], "the uploaded archive is gone"
    out = tenant.get("/admin/collections/here/export", videos=False)
    assert out.status_code == 200 and out.headers["content-type"] == "application/x-tar"
    (tmp_path / "out.tar").write_bytes(out.content)
    again = stranger.call("POST", "/admin/collections/import", files={"file": ("x.tar", out.content)})
    assert work(stranger, again.json()["task_id"])["result"]["collection"] == "here"
    (hit, *_) = stranger.search("here")["data"]
    assert round(hit["score"], 5) == round(found[0]["score"], 5)
    gone = client.get(hit["video_url"])
    assert (gone.status_code, gone.json()["code"]) == (404, "file_missing")
    assert "imported without its file" in gone.json()["detail"]
    number = hit["metadata"]["number"]
    back = stranger.upload("here", clip(number, 2.0 if number == 3 else 1.0))
    assert back.json()["duplicate_of"] == hit["video_id"]
    assert client.get(hit["video_url"]).status_code == 200, "an upload of the same file brings it back"


def test_a_collection_goes_from_one_tenant_of_a_running_service_to_another(server: Server, tenant: Tenant) -> None:
    collection, _ = tenant.filled(range(60, 62))
    out = tenant.get(f"/admin/collections/{collection}/export").content
    neighbour = new_tenant(server.client)
    answer = neighbour.call("POST", "/admin/collections/import", files={"file": ("a.tar", out)}, params={"collection": "mine"})
    assert neighbour.done(answer)["videos"] == 2
    there, here = (
        [(hit["filename"], round(hit["score"], 5)) for hit in who.search(name)["data"]]
        for who, name in ((neighbour, "mine"), (tenant, collection))
    )
    assert there == here


def test_an_import_is_refused_at_once_where_that_can_be_told(client: Any, archive: Path) -> None:
    tenant = new_tenant(client, {"max_videos": 3})
    good = archive.read_bytes()

    def send(data: bytes, role: str = "admin", **params: Any) -> tuple[int, str]:
        files = {"file": ("a.tar", data)}
        answer = tenant.call("POST", "/admin/collections/import", role, files=files, params=params)
        return answer.status_code, answer.json()["code"]

    assert send(good, role="write") == (403, "role_too_low")
    assert send(good) == (403, "quota_exceeded")
    assert send(b"nothing") == (422, "invalid_archive")
    assert send(bytes(400_000)) == (413, "body_too_large")
    assert send(good, collection="no/name") in ((422, "invalid_name"), (403, "quota_exceeded"))
    assert tenant.get("/admin/collections/nothing/export").json()["code"] == "collection_not_found"
    assert tenant.get("/admin/collections/films/export", role="write").status_code == 403
    assert client.app.state.services.storage.blobs.keys("imports/") == []
    assert list(client.app.state.services.storage.settings.scratch.iterdir()) == []


def test_an_import_over_http_fails_with_its_reason_and_may_be_run_again(
    client: Any, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = new_tenant(client)
    contents = members(archive)
    instead("/file", clip(77))(contents)
    false = sealed(tmp_path / "false.tar", contents).read_bytes()
    answer = tenant.call("POST", "/admin/collections/import", files={"file": ("a.tar", false)})
    task = work(tenant, answer.json()["task_id"])
    assert (task["status"], task["error"]["code"]) == ("failed", "invalid_archive")
    headers = {"Idempotency-Key": "once"}
    sent: dict[str, Any] = {"files": {"file": ("a.tar", archive.read_bytes())}, "headers": headers}
    answer = tenant.call("POST", "/admin/collections/import", **sent)
    assert tenant.call("POST", "/admin/collections/import", **sent).json() == answer.json()
    services = client.app.state.services
    with services.storage.database.read() as connection:
        owner = tenant_rows.tenant_named(connection, tenant.name)
        queued = task_rows.task(connection, owner.id, answer.json()["task_id"])

    def run_again() -> dict[str, Any]:
        storage, nothing = services.storage, lambda *_: None
        decoders = decoders_of(storage.settings)
        return import_collection.import_for_task(storage, services.encoder, decoders, queued, nothing, nothing)

    with monkeypatch.context() as patch:  # the worker is killed just before the end
        patch.setattr(delete, "purge_collection", lambda *_: None)
        patch.setattr(archive_rows, "reveal", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_again()
    assert work(tenant, queued.id)["status"] == "succeeded"
    again = run_again()
    assert again["collection"] == "films", "done already"
    assert len(tenant.found("films")) == 4


def test_the_commands_write_and_read_the_same_archive(house: House, weights: str, tmp_path: Path) -> None:
    run, data = CliRunner(), ["--data", str(house.storage.settings.data)]
    to = tmp_path / "films.tar"
    done = run.invoke(app, ["export", "films", str(to), "--no-videos", *data, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"bytes": to.stat().st_size, "videos": 4, "left_out": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["films.tar"]
    fresh = ["--data", str(tmp_path / "fresh"), "--tenant", "new"]
    done = run.invoke(app, ["import", str(to), "--collection", "copy", *fresh, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["videos"] == 4
    strange = ["--data", str(tmp_path / "strange"), "--backbone", "builtin", "--pretrained", weights]
    assert isinstance(run.invoke(app, ["import", str(to), *strange]).exception, ArchiveOfOtherBackbone)
    done = run.invoke(app, ["import", str(to), "--re-embed", *strange, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["failed"] == []
    assert run.invoke(app, ["import"]).exit_code == 2
