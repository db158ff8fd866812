import errno
import fcntl
import json
import logging
import os
import pickle
import resource
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from miniature import VIDEOS, captions, miniature, picture, write_clip, write_json, write_lines, write_table

from indexer.frames import FrameArchive
from training.corpora import CORPORA, Clip, Corpus, cache_frames, load_corpus
from training.dataset import SPLITS, load_dataset
from training.progress import Progress
from training.published import InvalidCorpus

SAMPLES = Path(os.environ.get("POLYCLIP_ANNOTATION_SAMPLES", "annotation-samples"))
SMALL = {"train": 3, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each small data set, written once; for reading only."""
    folder = tmp_path_factory.mktemp("corpora")
    return lambda name: root if (root := folder / name).exists() else miniature(name, folder, SMALL)


@pytest.fixture
def copy(roots: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A data set of one's own to spoil."""
    return lambda name: Path(shutil.copytree(roots(name), tmp_path / name))


def of(corpus: Corpus, split: str) -> list[Clip]:
    return [clip for clip in corpus.clips if clip.split == split]


def rows(dataset: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in dataset.read_text().splitlines()]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrites a JSON file as `change(value)`, or as the value that it has changed in place."""
    value = json.loads(path.read_text())
    changed = change(value)
    write_json(path, value if changed is None else changed)


# --- what is read


@pytest.mark.parametrize("name", CORPORA)
def test_every_data_set_comes_from_its_published_files_to_training_pixels(
    roots: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    corpus = load_corpus(name, roots(name))
    published = [split for split in SPLITS if split != "validation" or name not in ("msrvtt", "activitynet")]
    assert {split: len(of(corpus, split)) for split in SPLITS} == {s: SMALL[s] if s in published else 0 for s in SPLITS}
    long = name in ("didemo", "activitynet")
    assert (corpus.name, corpus.missing) == (name, ())
    assert (corpus.frames, corpus.words) == ((64, 64) if long else (12, 32))
    progress: list[Progress] = []
    dataset = cache_frames(corpus, tmp_path / "cache", progress=progress.append)
    assert progress == [Progress("decoding", n, len(corpus.clips)) for n in range(1, len(corpus.clips) + 1)]
    for row, clip in zip(rows(dataset), corpus.clips, strict=True):
        assert (row["video"], row["split"]) == (clip.video, clip.split)
        assert tuple(c["text"] for c in row["captions"]) == clip.captions
        archive = FrameArchive(Path(row["frames"]).read_bytes())
        assert [len(segment.frames) for segment in archive.segments] == [corpus.frames]
    loaded = load_dataset(dataset, tmp_path / "scratch", 16, corpus.frames)
    assert dict(loaded.splits) == {clip.video: clip.split for clip in corpus.clips}
    assert [pair.text for pair in loaded.pairs] == [text for clip in corpus.clips for text in clip.captions]
    numbers = [*range(3), *range(3, 5), *range(5, 7)] if len(published) == 3 else [*range(3), *range(5, 7)]
    for number, clip in zip(numbers, corpus.clips, strict=True):
        row_of = next(pair.clip for pair in loaded.pairs if pair.video == clip.video)
        shown = loaded.clips.pixels([row_of])[0].mean((0, 2, 3))
        middle = picture(number)[:, 16:80].mean((0, 1))
        assert np.abs(shown - middle).max() < 25, f"{clip.video} does not look like picture {number}"
    hidden = [path for path in (tmp_path / "cache").iterdir() if path.suffix not in (".zip", ".jsonl")]
    assert not hidden


def test_msrvtt_trains_on_all_captions_and_tests_on_the_one_sentence(roots: Callable[[str], Path]) -> None:
    corpus = load_corpus("msrvtt", roots("msrvtt"))
    assert [clip.captions for clip in of(corpus, "train")] == [tuple(captions(n, 3)) for n in range(3)]
    assert [clip.captions for clip in of(corpus, "test")] == [tuple(captions(n, 1)) for n in (5, 6)]
    assert {clip.video for clip in of(load_corpus("msrvtt", roots("msrvtt"), variant="7k"), "train")} == {"video0", "video1"}


def test_every_caption_of_msvd_and_vatex_is_a_query(roots: Callable[[str], Path]) -> None:
    for name in ("msvd", "vatex"):
        assert [clip.captions for clip in of(load_corpus(name, roots(name)), "test")] == [tuple(captions(n, 3)) for n in (5, 6)]


def test_paragraphs_are_the_sentences_joined(roots: Callable[[str], Path]) -> None:
    first, second = captions(5)
    assert of(load_corpus("didemo", roots("didemo")), "test")[0].captions == (f"{first} {second}",)
    assert of(load_corpus("activitynet", roots("activitynet")), "test")[0].captions == (f"{first}. {second}.",)


def test_msvd_captions_come_from_the_pickle_too(copy: Callable[[str], Path]) -> None:
    root = copy("msvd")
    expected = load_corpus("msvd", root)
    texts = json.loads((root / "captions_msvd.json").read_text())
    (root / "captions_msvd.json").unlink()
    for protocol in (2, 4):
        with (root / "raw-captions.pkl").open("wb") as file:
            pickle.dump({video: [text.split() for text in own] for video, own in texts.items()}, file, protocol)
        assert load_corpus("msvd", root) == expected


def test_vatex_captions_come_in_three_more_forms(copy: Callable[[str], Path]) -> None:
    root = copy("vatex")
    expected = load_corpus("vatex", root)
    entries = [*json.loads((root / "vatex_training_v1.0.json").read_text("utf-8"))]
    entries += json.loads((root / "vatex_validation_v1.0.json").read_text("utf-8"))
    for file in root.glob("*.json"):
        file.unlink()
    for name, text in (
        ("vatex_data.json", json.dumps({row["videoID"]: row for row in entries})),
        ("ref_captions.json", json.dumps({row["videoID"]: row["enCap"] for row in entries})),
        ("vatex_captions.jsonl", "\n".join(map(json.dumps, entries))),
    ):
        (root / name).write_text(text)
        assert load_corpus("vatex", root) == expected
        (root / name).unlink()


def test_the_other_test_list_of_vatex_takes_its_videos_from_the_validation_list(roots: Callable[[str], Path]) -> None:
    corpus = load_corpus("vatex", roots("vatex"), variant="1k5")
    tested, held = ({clip.video for clip in of(corpus, split)} for split in ("test", "validation"))
    assert len(tested) == 2 and len(held) == 1 and not tested & held


def test_list_files_narrow_didemo(copy: Callable[[str], Path]) -> None:
    root = copy("didemo")
    kept = of(load_corpus("didemo", root), "test")[1].video
    write_lines(root / "test_list.txt", [kept])
    assert [clip.video for clip in of(load_corpus("didemo", root), "test")] == [kept]


def test_activitynet_comes_as_a_table_and_as_moments_too(copy: Callable[[str], Path]) -> None:
    root = copy("activitynet")
    expected = load_corpus("activitynet", root)
    data = json.loads((root / "val_1.json").read_text())
    sentences = [(video, sentence) for video, value in data.items() for sentence in value["sentences"]]
    (root / "val_1.json").unlink()
    write_table(root / "val_1.csv", [{"video_id": v, "caption": s, "start": 0, "idx": 1} for v, s in sentences], "\t")
    assert load_corpus("activitynet", root) == expected
    (root / "val_1.csv").unlink()
    lines = [json.dumps({"qid": 1, "query": s, "vid": v, "relevant_windows": [[0, 1]]}) for v, s in sentences]
    write_lines(root / "activitynet_val_release.jsonl", lines)
    assert load_corpus("activitynet", root) == expected


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="POLYCLIP_ANNOTATION_SAMPLES names no folder of published files")
def test_the_published_samples_are_read(tmp_path: Path) -> None:
    """Real lines of every published file; the videos are empty files, which only `cache_frames` would mind."""

    def sample(name: str, to: str) -> str:
        text = (SAMPLES / name).read_text("utf-8")
        (tmp_path / to).write_text(text, "utf-8")
        return text

    def counts(name: str, videos: list[str]) -> list[int]:
        for video in videos:
            (tmp_path / video).touch()
        corpus = load_corpus(name, tmp_path)
        assert all(text == text.strip() for clip in corpus.clips for text in clip.captions)
        return [len(of(corpus, split)) for split in SPLITS]

    sample("MSRVTT_JSFUSION_test.csv", "MSRVTT_JSFUSION_test.csv")
    sample("MSRVTT_train.9k.sample.csv", "MSRVTT_train.9k.csv")
    known = [{"video_id": f"video{n}"} for n in range(10000)]
    write_json(tmp_path / "MSRVTT_data.json", {"videos": known, "sentences": [{**v, "caption": "a cat"} for v in known]})
    assert counts("msrvtt", [f"video{n}.mp4" for n in range(10000)]) == [50, 0, 1000]

    trained = json.loads(sample("activitynet_train.sample.json", "train.json"))
    tested = json.loads(sample("activitynet_val_1.sample.json", "val_1.json"))
    videos = [f"{video.removeprefix('v_')}.mkv" for video in (*trained, *tested)]
    assert counts("activitynet", videos) == [len(trained), 0, len(tested)]
    (tmp_path / "val_1.json").unlink()
    lines = sample("activitynet_val_1.sample.csv", "val_1.csv").splitlines()[1:]
    ids = list(dict.fromkeys(line.partition("\t")[0] for line in lines))
    assert counts("activitynet", [f"{video}.mkv" for video in ids if f"{video[2:]}.mkv" not in videos])[2] == len(ids)
    moments = sample("activitynet_val_release.sample.jsonl", "activitynet_val_release.jsonl").splitlines()
    assert counts("activitynet", [])[2] == len({json.loads(line)["vid"] for line in moments})

    held = json.loads(sample("didemo_val_data.sample.json", "val_data.json"))
    tests = json.loads(sample("didemo_test_data.sample.json", "test_data.json"))
    write_json(tmp_path / "train_data.json", [{"video": "1@N00_2.mov", "description": "a cat"}])
    sets = [{row["video"] for row in part} for part in (held, tests)]
    assert counts("didemo", ["1@N00_2.mov", *sorted(sets[0] | sets[1])]) == [1, len(sets[0]), len(sets[1])]

    vatex = [json.loads(line) for line in sample("vatex_captions.sample.jsonl", "vatex_captions.jsonl").splitlines()]
    lists = [sample(f"vatex_{part}_list.sample.txt", f"{part}_list.txt").split() for part in ("train", "val", "test")]
    vatex += [{"videoID": video, "enCap": ["a cat"]} for part in lists for video in part]
    write_lines(tmp_path / "vatex_captions.jsonl", [json.dumps(row) for row in vatex])
    assert counts("vatex", [f"{video}.mp4" for part in lists for video in part]) == [len(part) for part in lists]

    texts = json.loads(sample("captions_msvd.sample.json", "captions_msvd.json"))
    lists = [sample(f"msvd_{part}_list.sample.txt", f"{part}_list.txt").split() for part in ("train", "val", "test")]
    assert set(texts) <= set(lists[0])
    write_json(tmp_path / "captions_msvd.json", {video: ["a cat"] for part in lists for video in part} | texts)
    assert counts("msvd", [f"{video}.avi" for part in lists for video in part]) == [len(part) for part in lists]


def test_a_demo_folder_is_a_jsonl_corpus(tmp_path: Path) -> None:
    write_clip(tmp_path / "night-0001.mp4", picture(0))
    write_lines(tmp_path / "captions.jsonl", ['{"file": "night-0001.mp4", "captions": ["one", "two"]}', ""])
    corpus = load_corpus("jsonl", tmp_path)
    assert [(c.file.name, c.split, c.captions) for c in corpus.clips] == [("night-0001.mp4", "train", ("one", "two"))]
    (tmp_path / "captions.jsonl").rename(tmp_path / "mine.jsonl")
    assert load_corpus("jsonl", tmp_path / "mine.jsonl") == corpus


def test_a_path_goes_before_a_name(tmp_path: Path) -> None:
    for place in ("clip.mp4", "b/clip.mp4"):
        write_clip(tmp_path / "videos" / place, picture(0))
    rows = [{"video": "./clip.mp4", "caption": "a"}, {"video": "b/clip.mp4", "caption": "b"}]
    write_lines(tmp_path / "captions.jsonl", [json.dumps(row) for row in rows])
    files = {clip.video: clip.file.relative_to(tmp_path).as_posix() for clip in load_corpus("jsonl", tmp_path).clips}
    assert files == {"clip.mp4": "videos/clip.mp4", "b/clip.mp4": "videos/b/clip.mp4"}


def test_a_link_that_leads_back_does_not_hang(copy: Callable[[str], Path]) -> None:
    root = copy("msrvtt")
    (root / "videos" / "again").symlink_to(root / "videos", target_is_directory=True)
    assert len(load_corpus("msrvtt", root).clips) == 5


# --- what is refused


def test_names_are_found_in_either_form_of_unicode_and_pipes_are_no_videos(tmp_path: Path) -> None:
    composed = "Café.mp4"
    decomposed = normalize("NFD", composed)
    (tmp_path / decomposed).write_bytes(b"")
    os.mkfifo(tmp_path / "live.mp4")
    for name in (composed, decomposed):
        write_lines(tmp_path / "captions.jsonl", [json.dumps({"video": name, "caption": "a café"})])
        assert [clip.file.name for clip in load_corpus("jsonl", tmp_path).clips] == [decomposed]
    write_lines(tmp_path / "captions.jsonl", [json.dumps({"video": "live.mp4", "caption": "a pipe"})])
    refused("jsonl", tmp_path, "no file below")
    write_lines(tmp_path / "captions.jsonl", [json.dumps({"video": composed, "caption": "a café"})])
    (tmp_path / composed).write_bytes(b"")
    refused("jsonl", tmp_path, "more than one file")


def refused(name: str, root: Path, reason: str, **options: Any) -> None:
    with pytest.raises(InvalidCorpus, match=reason) as told:
        load_corpus(name, root, **options)
    assert "\n" not in str(told.value)


def test_names_that_do_not_exist(roots: Callable[[str], Path], tmp_path: Path) -> None:
    refused("lsmdc", tmp_path, "no data set 'lsmdc'; known are msrvtt, msvd")
    refused("msrvtt", roots("msrvtt"), "no variant '8k'; known are 9k, 7k", variant="8k")
    refused("msvd", roots("msvd"), "no variant '9k'; known are none", variant="9k")
    refused("msvd", tmp_path / "nowhere", "no folder")
    refused("msvd", tmp_path, "no captions_msvd.json or raw-captions.json or raw-captions.pkl in")


@pytest.mark.parametrize(
    ("name", "listed", "leaked"),
    [
        ("msrvtt", "MSRVTT_train.9k.csv", "video5"),
        ("msvd", "train_list.txt", "-4wsu_CjD05_5_5"),
        ("vatex", "train_list.txt", "Ptf_2VRj-05_000122_000132"),
        ("msvd", "val_list.txt", "-4wsu_CjD05_5_5"),
    ],
)
def test_a_test_video_never_trains(copy: Callable[[str], Path], name: str, listed: str, leaked: str) -> None:
    root = copy(name)
    with (root / listed).open("a") as file:
        file.write(leaked + "\n")
    refused(name, root, f"video '{leaked}' is in (train|validation) and in test")


def test_a_test_video_never_trains_in_json_either(copy: Callable[[str], Path]) -> None:
    didemo, activitynet = copy("didemo"), copy("activitynet")
    tested = json.loads((didemo / "test_data.json").read_text())
    edit(didemo / "train_data.json", lambda rows: rows.append(tested[0]))
    refused("didemo", didemo, "is in train and in test")
    paragraphs = json.loads((activitynet / "val_1.json").read_text())
    edit(activitynet / "train.json", lambda videos: videos.update(paragraphs))
    refused("activitynet", activitynet, "is in train and in test")


def test_two_ids_of_one_file_in_two_splits_are_a_leak_too(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", picture(0))
    rows = [{"video": "clip.mp4", "caption": "a"}, {"video": "clip", "caption": "a", "split": "test"}]
    write_lines(tmp_path / "captions.jsonl", [json.dumps(row) for row in rows])
    refused("jsonl", tmp_path, r"'clip' \(the file of 'clip.mp4'\) is in train and in test")


def test_missing_videos_are_named_and_left_out_only_when_that_is_allowed(copy: Callable[[str], Path]) -> None:
    root = copy("msrvtt")
    (root / "videos" / "all" / "video1.mp4").unlink()
    (root / "videos" / "all" / "video6.mp4").unlink()
    refused("msrvtt", root, r"2 of 5 videos have no file below .*: 'video1', 'video6'$")
    corpus = load_corpus("msrvtt", root, allow_missing=True)
    assert corpus.missing == ("video1", "video6")
    assert [clip.video for clip in corpus.clips] == ["video0", "video2", "video5"]
    shutil.rmtree(root / "videos")
    refused("msrvtt", root, "none of the 5 videos has a file", allow_missing=True)


def test_many_missing_videos_are_counted(roots: Callable[[str], Path], tmp_path: Path) -> None:
    for file in roots("vatex").glob("*.*"):
        shutil.copy(file, tmp_path)
    refused("vatex", tmp_path, "7 of 7 videos .* and 2 more$")


def test_two_files_of_one_video_are_told(copy: Callable[[str], Path]) -> None:
    root = copy("msrvtt")
    shutil.copy(root / "videos" / "all" / "video1.mp4", root / "videos" / "video1.webm")
    refused("msrvtt", root, "video 'video1' has more than one file: .*video1.webm and .*video1.mp4")


def add(row: Any) -> Callable[[Any], None]:
    return lambda rows: rows.append(row)


@pytest.mark.parametrize(
    ("name", "file", "change", "reason"),
    [
        ("msrvtt", "MSRVTT_data.json", lambda d: d.pop("sentences") and None, "MSRVTT_data.json: needs 'sentences'"),
        ("msrvtt", "MSRVTT_data.json", lambda d: d["sentences"].append("x"), "sentence 16: needs 'video_id'"),
        (
            "msrvtt",
            "MSRVTT_data.json",
            lambda d: d["sentences"].append({"video_id": "video77", "caption": "a cat"}),
            "sentence 16: a caption of 'video77', which is not among its videos",
        ),
        ("msrvtt", "MSRVTT_data.json", lambda d: d["sentences"][1].update(caption=" "), "sentence 2: an empty caption"),
        ("msrvtt", "MSRVTT_data.json", lambda d: d["sentences"][1].update(caption=7), "sentence 2: a caption is not text"),
        (
            "msrvtt",
            "MSRVTT_data.json",
            lambda d: d.update(sentences=d["sentences"][3:]),
            "MSRVTT_train.9k.csv: 1 of its videos have no captions: 'video0'",
        ),
        ("msvd", "captions_msvd.json", lambda d: d.pop("-4wsu_CjD00_5_0") and None, "train_list.txt: 1 of its videos have no"),
        ("msvd", "captions_msvd.json", lambda d: d.update({"-4wsu_CjD00_5_0": []}), "'-4wsu_CjD00_5_0': no list of captions"),
        ("msvd", "captions_msvd.json", lambda d: d.update({"-4wsu_CjD00_5_0": ["a", ""]}), "an empty caption"),
        ("msvd", "captions_msvd.json", lambda d: {}, "captions_msvd.json: no videos in it"),
        ("vatex", "vatex_training_v1.0.json", add({"videoID": "x"}), "entry 4: no list of captions"),
        ("vatex", "vatex_training_v1.0.json", add({"enCap": ["x"]}), "entry 4: needs 'videoID'"),
        ("vatex", "vatex_training_v1.0.json", add(["x"]), "entry 4: not an object"),
        ("vatex", "vatex_training_v1.0.json", lambda d: "x", "not a list"),
        ("didemo", "val_data.json", add({"description": "a cat"}), "val_data.json, entry 5: needs 'video'"),
        ("didemo", "val_data.json", add({"video": "a.mp4"}), "entry 5: a caption of 'a.mp4' is not text"),
        ("didemo", "val_data.json", add({"video": "a.mp4", "description": ""}), "'a.mp4': an empty caption"),
        ("didemo", "val_data.json", lambda d: [], "val_data.json: no videos in it"),
        ("activitynet", "val_1.json", lambda d: d.update(v_x={"duration": 1}), "val_1.json, 'v_x': needs 'sentences'"),
        ("activitynet", "val_1.json", lambda d: d.update(v_x={"sentences": []}), "val_1.json, 'v_x': no sentences"),
        ("activitynet", "val_1.json", lambda d: d.update(v_x={"sentences": ["", " "]}), "'v_x': an empty caption"),
        ("activitynet", "val_1.json", lambda d: [d], "val_1.json: not an object of videos"),
    ],
)
def test_a_broken_annotation_is_told_with_its_place(
    copy: Callable[[str], Path], name: str, file: str, change: Callable[[Any], Any], reason: str
) -> None:
    root = copy(name)
    edit(root / file, change)
    refused(name, root, reason)


@pytest.mark.parametrize(
    ("name", "file", "data", "reason"),
    [
        ("msrvtt", "MSRVTT_data.json", b'{"videos": [\n,', "MSRVTT_data.json, line 2: not JSON"),
        ("msrvtt", "MSRVTT_data.json", b"[" * 100_000, "MSRVTT_data.json: nested too deeply"),
        ("msrvtt", "MSRVTT_data.json", b"\xff\xfe", r"MSRVTT_data.json: not UTF-8 text \(byte 0\)"),
        ("msrvtt", "MSRVTT_train.9k.csv", b"id\nvideo0\n", "MSRVTT_train.9k.csv, line 2: needs 'video_id'"),
        ("msrvtt", "MSRVTT_train.9k.csv", b"video_id\n", "MSRVTT_train.9k.csv: no videos in it"),
        (
            "msrvtt",
            "MSRVTT_train.9k.csv",
            b"video_id\nvideo0\nvideo99\n",
            "9k.csv: 1 of its videos have no captions: 'video99'",
        ),
        ("msrvtt", "MSRVTT_JSFUSION_test.csv", b"key,video_id,sentence\n", "MSRVTT_JSFUSION_test.csv: no videos in it"),
        ("msrvtt", "MSRVTT_JSFUSION_test.csv", b"key,video_id,sentence\nret0,video5,\n", "line 2: an empty caption"),
        ("msrvtt", "MSRVTT_JSFUSION_test.csv", b"key,video_id,sentence\nret0,video5\n", "line 2: a caption is not text"),
        ("msrvtt", "MSRVTT_JSFUSION_test.csv", b'key,video_id,sentence\n"' + b"x" * 200_000, "line 2: field larger than"),
        ("msvd", "val_list.txt", b"\n", "val_list.txt: no videos in it"),
        ("jsonl", "captions.jsonl", b"\n", "captions.jsonl: no videos in it"),
        ("jsonl", "captions.jsonl", b'\n{"video"', "captions.jsonl, line 2: not JSON"),
        ("jsonl", "captions.jsonl", b'["clip 0.mp4"]', "captions.jsonl, line 1: not an object"),
        ("jsonl", "captions.jsonl", b'{"caption": "a"}', "captions.jsonl, line 1: needs 'file'"),
        ("jsonl", "captions.jsonl", b'{"video": "clip 0.mp4"}', "line 1: a caption is not text"),
        ("jsonl", "captions.jsonl", b'{"video": "clip 0.mp4", "caption": " "}', "line 1: an empty caption"),
        ("jsonl", "captions.jsonl", b'{"video": "clip 0.mp4", "captions": "a"}', "line 1: no list of captions"),
        (
            "jsonl",
            "captions.jsonl",
            b'{"video": "clip 0.mp4", "caption": "a", "split": "val"}',
            "no split 'val'; known are tra",
        ),
        ("jsonl", "captions.jsonl", b'{"video": "gone.mp4", "caption": "a"}', "1 of 1 videos have no file"),
        ("jsonl", "captions.jsonl", b'{"video": "/etc/passwd.mp4", "caption": "a"}', "1 of 1 videos have no file"),
        (
            "jsonl",
            "captions.jsonl",
            b'{"video": "clip 0.mp4", "caption": "a"}\n{"video": "clip 0.mp4", "caption": "a", "split": "test"}',
            "'clip 0.mp4' is in train and in test",
        ),
    ],
)
def test_a_broken_file_is_told_with_its_place(
    copy: Callable[[str], Path], name: str, file: str, data: bytes, reason: str
) -> None:
    root = copy(name)
    (root / file).write_bytes(data)
    refused(name, root, reason)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps({"a": Bomb()}), r"it asks for posix.mkdir\); put its captions into raw-captions.json"),
        (pickle.dumps(OrderedDict(a=[["a", "cat"]])), "it asks for collections.OrderedDict"),
        (pickle.dumps({"a": [np.str_("cat")]}), "it asks for numpy"),
        (b"not a pickle", "not a pickle of plain lists and strings"),
        (b"", "not a pickle of plain lists and strings"),
        (pickle.dumps(["a"]), "not a dict of captions by video"),
        (pickle.dumps({"a": [[b"cat"]]}, protocol=4), "a caption is not text"),
    ],
)
def test_a_pickle_runs_nothing(
    copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str
) -> None:
    root = copy("msvd")
    (root / "captions_msvd.json").unlink()
    (root / "raw-captions.pkl").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    refused("msvd", root, reason)
    assert not (tmp_path / "exploded").exists()


def test_captions_that_no_list_names_are_told(copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    root = copy("msvd")
    edit(root / "captions_msvd.json", lambda d: d.update({"stranger_1_2": ["a cat"]}))
    with caplog.at_level(logging.WARNING):
        assert len(load_corpus("msvd", root).clips) == 7
    assert "1 videos with captions are in no list: 'stranger_1_2'" in caplog.text


# --- the cached frames


def archives(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.zip")}


def test_a_second_call_decodes_nothing_and_gives_the_same_file(roots: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = load_corpus("msrvtt", roots("msrvtt"))
    first = cache_frames(corpus, tmp_path)
    before, text = archives(tmp_path), first.read_text()
    assert cache_frames(corpus, tmp_path) == first
    assert archives(tmp_path) == before and first.read_text() == text


def test_what_was_lost_is_decoded_again_and_nothing_else(roots: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = load_corpus("msrvtt", roots("msrvtt"))
    lost = Path(rows(cache_frames(corpus, tmp_path))[2]["frames"])
    before = archives(tmp_path)
    lost.unlink()
    cache_frames(corpus, tmp_path)
    after = archives(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {lost.name}


def test_a_replaced_video_is_decoded_again(copy: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = load_corpus("msrvtt", copy("msrvtt"))
    before = {row["video"]: Path(row["frames"]) for row in rows(cache_frames(corpus, tmp_path / "cache"))}
    write_clip(corpus.clips[0].file, np.full_like(picture(0), 9))
    after = {row["video"]: Path(row["frames"]) for row in rows(cache_frames(corpus, tmp_path / "cache"))}
    assert {video for video in after if after[video] != before[video]} == {corpus.clips[0].video}
    archive = FrameArchive(after[corpus.clips[0].video].read_bytes())
    assert archive.pixels(archive.segments[0].frames, 8).mean() < 20


def test_frames_are_kept_as_large_as_the_backbone_takes_them(
    copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load_corpus("msrvtt", copy("msrvtt"))
    monkeypatch.setattr("miniature.SIZE", (480, 400))
    write_clip(corpus.clips[0].file, np.zeros((400, 480, 3), np.uint8))
    for side, kept in ((0, 256), (224, 256), (384, 384), (448, 400)):
        cached = {row["video"]: Path(row["frames"]) for row in rows(cache_frames(corpus, tmp_path / "cache", side=side))}
        assert FrameArchive(cached[corpus.clips[0].video].read_bytes()).short_side() == kept


def test_another_number_of_frames_is_another_archive(roots: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = load_corpus("msrvtt", roots("msrvtt"))
    cache_frames(corpus, tmp_path, splits=["test"])
    cache_frames(Corpus(corpus.name, corpus.clips, 4, 32, ()), tmp_path, splits=["test"])
    assert sorted(len(FrameArchive(path.read_bytes()).segments[0].frames) for path in tmp_path.glob("*.zip")) == [4, 4, 12, 12]


def test_only_the_splits_that_are_asked_for_are_decoded(roots: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = load_corpus("msvd", roots("msvd"))
    tested = cache_frames(corpus, tmp_path, splits=["test"])
    assert {row["split"] for row in rows(tested)} == {"test"} and len(archives(tmp_path)) == 2
    assert cache_frames(corpus, tmp_path, splits=["train"]) != tested and tested.exists()
    with pytest.raises(InvalidCorpus, match="msrvtt has no validation videos"):
        cache_frames(load_corpus("msrvtt", roots("msrvtt")), tmp_path, splits=["validation"])
    with pytest.raises(InvalidCorpus, match="no split 'val'; known are train, validation, test"):
        cache_frames(corpus, tmp_path, splits=["val"])


def test_corrupt_videos_are_collected_and_named(
    copy: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = copy("msrvtt")
    (root / "videos" / "all" / "video1.mp4").write_bytes(b"")
    (root / "videos" / "all" / "video6.mp4").write_bytes(b"no video at all")
    corpus = load_corpus("msrvtt", root)
    with pytest.raises(InvalidCorpus, match=r"2 of 5 .* decoded: 'video1' \(The file is empty\), 'video6' \(The file is not"):
        cache_frames(corpus, tmp_path / "cache")
    assert len(archives(tmp_path / "cache")) == 3 and not list((tmp_path / "cache").glob("*.jsonl"))
    with caplog.at_level(logging.WARNING):
        dataset = cache_frames(corpus, tmp_path / "cache", allow_missing=True)
    assert [row["video"] for row in rows(dataset)] == ["video0", "video2", "video5"]
    assert "2 of 5 videos cannot be decoded: 'video1'" in caplog.text
    (root / "videos" / "all" / "video5.mp4").unlink()
    with pytest.raises(InvalidCorpus, match="not one test video can be decoded"):
        cache_frames(corpus, tmp_path / "cache", allow_missing=True)


def test_only_the_first_30_seconds_of_a_didemo_video_count(copy: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy("didemo")
    corpus = load_corpus("didemo", root)
    file = next(clip.file for clip in corpus.clips if clip.split == "test")

    def brighter(seconds: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.full_like(picture(0), int(4 * seconds) if seconds < 30 else 250)

    write_clip(file, brighter, seconds=50, fps=4)
    archive = FrameArchive(Path(rows(cache_frames(corpus, tmp_path / "cache", splits=["test"]))[0]["frames"]).read_bytes())
    assert [(segment.start, segment.end, len(segment.frames)) for segment in archive.segments] == [(0.0, 30.0, 64)]
    shown = archive.pixels(archive.segments[0].frames, 8).mean((1, 2, 3)).astype(float)
    assert (np.diff(shown) >= -2).all() and shown[0] < 10 and 105 < shown[-1] < 130


def test_a_full_disk_leaves_nothing_half_written(roots: Callable[[str], Path], tmp_path: Path) -> None:
    """Files may have 2,000 bytes here, which no archive has: that stands for the disk."""
    corpus = load_corpus("msrvtt", roots("msrvtt"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError) as told:
            cache_frames(corpus, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())
    assert len(rows(cache_frames(corpus, tmp_path))) == 5


def test_what_a_killed_run_left_is_removed_by_the_next_one_that_is_alone(roots: Callable[[str], Path], tmp_path: Path) -> None:
    corpus = load_corpus("msrvtt", roots("msrvtt"))
    folder, file = tmp_path / ".decoding-abc", tmp_path / ".archive.zip.0123abcd.part"
    folder.mkdir()
    (folder / "frame.jpg").write_bytes(b"half")
    file.write_bytes(b"half")
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    cache_frames(corpus, tmp_path)
    assert folder.exists() and file.exists(), "it may be what the other run is writing"
    os.close(other)
    cache_frames(corpus, tmp_path)
    assert not folder.exists() and not file.exists()


def test_the_miniature_has_enough_to_learn_from(tmp_path: Path) -> None:
    corpus = load_corpus("jsonl", miniature("jsonl", tmp_path))
    assert {split: len(of(corpus, split)) for split in SPLITS} == VIDEOS
    assert len({clip.captions[0] for clip in corpus.clips}) == len(corpus.clips)


def test_videos_without_captions_are_left_out_where_that_is_allowed(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = copy("msvd")
    texts = json.loads((root / "captions_msvd.json").read_text())
    whole = load_corpus("msvd", root)
    silent = next(clip.video for clip in whole.clips if sum(c.split == clip.split for c in whole.clips) > 1)
    (root / "captions_msvd.json").write_text(json.dumps({v: t for v, t in texts.items() if v != silent}))
    refused("msvd", root, f"1 of its videos have no captions: '{silent}'")
    left = load_corpus("msvd", root, allow_missing=True)
    assert {clip.video for clip in whole.clips} - {clip.video for clip in left.clips} == {silent}
    assert silent in caplog.text and "left out" in caplog.text
