"""A data folder may be called anything: what is its own stays in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from house import House
from pydantic import ValidationError

from service.jobs.queue import prepare_engine
from service.settings import Settings
from service.storage.blobs import Blobs
from service.upkeep import delete

NAMES = ["plain", "lib#1", "lib#2", "what?", "50%", "a%23b", "two words", "Zoë", "a+b&c=d;e"]


def test_data_folders_of_any_name_keep_apart(tmp_path: Path) -> None:
    held: dict[str, set[Path]] = {}
    for number, name in enumerate(NAMES):
        before = set(tmp_path.rglob("*"))
        with House(tmp_path / name) as house:
            house.add_video(house.add_collection("films"), number)
        prepare_engine(Settings(data=tmp_path / name))
        made = set(tmp_path.rglob("*")) - before
        assert {path.relative_to(tmp_path).parts[0] for path in made} == {name}
        assert {"polyclip.sqlite", "jobs.sqlite"} <= {path.name for path in made}
        held[name] = {path for path in (tmp_path / name / "blobs").rglob("*") if path.is_file()}
        assert held[name]
    for name in NAMES:
        with House(tmp_path / name, tenant="other") as house:
            delete.sweep_orphans(house.storage, grace=0)
            assert house.storage.blobs.keys("videos/")
    assert held == {name: {p for p in (tmp_path / name / "blobs").rglob("*") if p.is_file()} for name in NAMES}


@pytest.mark.parametrize(("name", "before"), [("lib#1", "lib"), ("what?", "what"), ("a%20b", "a b/blobs")])
def test_files_that_an_earlier_version_put_elsewhere_are_found(tmp_path: Path, name: str, before: str) -> None:
    settings = Settings(data=tmp_path / name)
    assert settings.misplaced is None
    (tmp_path / before / "videos").mkdir(parents=True)
    assert settings.misplaced == tmp_path / before
    assert Settings(data=tmp_path / "plain").misplaced is None


def test_a_folder_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="not UTF-8"):
        Settings(data=Path(os.fsdecode(b"/srv/caf\xe9")))


@pytest.mark.parametrize("url", ["file:///srv/lib#1/blobs", "file:///srv/what?/blobs"])
def test_a_file_url_that_names_another_folder_than_it_seems_to_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="%23"):
        Settings(blobs=url)


def test_a_file_url_is_unquoted_the_same_way_by_reads_and_writes(tmp_path: Path) -> None:
    blobs = Blobs((tmp_path / "100% #1?").as_uri(), tmp_path / "scratch")
    blobs.put("videos/col_1/vid_1", b"bytes")
    assert blobs.get("videos/col_1/vid_1") == (tmp_path / "100% #1?/videos/col_1/vid_1").read_bytes() == b"bytes"
