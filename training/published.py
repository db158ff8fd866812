"""The annotation files of the data sets, as they are published: which video is in which split, with which captions.

A reader takes the folder of the files, a variant and whether to leave out listed videos without captions, and raises
InvalidCorpus where a file is not what it should be. What the files look like and where they come from is told in
docs/datasets.md.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from training.dataset import SPLITS

VATEX_CAPTIONS = (
    "vatex_data.json",
    "ref_captions.json",
    "vatex_captions.json",
    "vatex_captions.jsonl",
    "vatex_training_v1.0.json",
    "vatex_validation_v1.0.json",
    "vatex_public_test_english_v1.1.json",
)
NAMED = 5  # videos named in a message; the others are counted

Captions = dict[str, list[str]]  # by video id
Splits = dict[str, Captions]
Videos = TypeVar("Videos", dict[str, None], Captions)

logger = logging.getLogger(__name__)


class InvalidCorpus(ValueError):
    """The files are not the data set that they should be; the message says where and why, in one line."""


def msrvtt(root: Path, variant: str | None, allow_missing: bool) -> Splits:
    """Twenty captions a training video; a test video has the one sentence of the 1k-A list."""
    train, test = _find(root, f"MSRVTT_train.{variant}.csv"), _find(root, "MSRVTT_JSFUSION_test.csv")
    path = _find(root, "MSRVTT_data.json")
    data, captions = _json(path), Captions()
    known = {_field(v, "video_id", str, f"{path.name}, videos") for v in _field(data, "videos", list, path.name)}
    for number, row in enumerate(_field(data, "sentences", list, path.name), start=1):
        where = f"{path.name}, sentence {number}"
        video = _field(row, "video_id", str, where)
        if video not in known:
            raise InvalidCorpus(f"{where}: a caption of {video!r}, which is not among its videos")
        captions.setdefault(video, []).append(_clean(row.get("caption"), where))
    tested = Captions()
    for where, row in _rows(test):
        tested.setdefault(_field(row, "video_id", str, where), []).append(_clean(row.get("sentence"), where))
    listed = dict.fromkeys(_field(row, "video_id", str, where) for where, row in _rows(train))
    return {"train": _of(listed, captions, train, allow_missing), "test": _filled(tested, test)}


def msvd(root: Path, _: str | None, allow_missing: bool) -> Splits:
    path = _find(root, "captions_msvd.json", "raw-captions.json", "raw-captions.pkl")
    captions = _by_id(path)
    names = {"train": "train_list.txt", "validation": "val_list.txt", "test": "test_list.txt"}
    splits = _lists(root, captions, names, allow_missing)
    if unknown := [video for video in captions if not any(video in split for split in splits.values())]:
        logger.warning("%s: %d videos with captions are in no list: %s; left out", path.name, len(unknown), named(unknown))
    return splits


def vatex(root: Path, variant: str | None, allow_missing: bool) -> Splits:
    """`hgr` is the split of Chen et al. 2020, `1k5` CLIP2Video's own test list, whose videos leave the validation list."""
    captions = Captions()
    for path in [path for name in VATEX_CAPTIONS if (path := root / name).is_file()] or [_find(root, *VATEX_CAPTIONS)]:
        captions |= _by_id(path)
    test = {"hgr": "test_list.txt", "1k5": "test1k5_sec_list.txt"}[variant or "hgr"]
    names = {"train": "train_list.txt", "validation": "val_list.txt", "test": test}
    splits = _lists(root, captions, names, allow_missing)
    if variant == "1k5":
        splits["validation"] = {v: texts for v, texts in splits["validation"].items() if v not in splits["test"]}
    return splits


def didemo(root: Path, _: str | None, allow_missing: bool) -> Splits:
    """The descriptions of a video make one paragraph. A list file beside the JSON narrows it, as CLIP4Clip's do."""
    splits = Splits()
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        path = _find(root, f"{short}_data.json")
        rows = ((where, _field(row, "video", str, where), row.get("description")) for where, row in _rows(path))
        splits[split] = _paragraphs(rows, path)
        if (listed := root / f"{short}_list.txt").is_file():
            splits[split] = _of(_ids(listed), splits[split], listed, allow_missing)
    return splits


def activitynet(root: Path, _: str | None, __: bool) -> Splits:
    """The sentences of a video make one paragraph; val_1 is the test split."""
    splits = Splits()
    for split, names in (
        ("train", ("train.json", "activitynet_train_release.jsonl", "train.csv")),
        ("test", ("val_1.json", "activitynet_val_release.jsonl", "val_1.csv")),
    ):
        path = _find(root, *names)
        splits[split] = _paragraphs(_sentences(path), path)
    return splits


def _sentences(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(place in the file, video, sentence) of ActivityNet Captions, as JSON, as a table, or as moments to find."""
    if path.suffix != ".json":
        video, sentence = ("vid", "query") if path.suffix == ".jsonl" else ("video_id", "caption")
        for where, row in _rows(path):
            yield where, _field(row, video, str, where), row.get(sentence)
        return
    data = _json(path)
    if not isinstance(data, dict):
        raise InvalidCorpus(f"{path.name}: not an object of videos")
    for video, value in data.items():
        where = f"{path.name}, {video!r}"
        sentences = _field(value, "sentences", list, where)
        if not sentences:
            raise InvalidCorpus(f"{where}: no sentences")
        yield from ((where, video, sentence) for sentence in sentences)


def jsonl(root: Path, _: str | None, __: bool) -> Splits:
    """Lines of {"video": file, "caption": text or "captions": [text, …], "split": one of SPLITS, default train}.

    `root` may be the file itself.
    """
    path = root if root.is_file() else _find(root, "captions.jsonl")
    splits: Splits = {split: {} for split in SPLITS}
    for where, row in _rows(path):
        video = PurePosixPath(_field(row, "video" if "video" in row else "file", str, where)).as_posix()
        split = row.get("split", "train")
        if split not in SPLITS:
            raise InvalidCorpus(f"{where}: there is no split {split!r}; known are {', '.join(SPLITS)}")
        texts = _texts(row["captions"] if "captions" in row else [row.get("caption")], where)
        splits[split].setdefault(video, []).extend(texts)
    if not any(splits.values()):
        raise InvalidCorpus(f"{path.name}: no videos in it")
    return splits


# --- the files


def _find(root: Path, *names: str) -> Path:
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise InvalidCorpus(f"there is no {' or '.join(names)} in {root}")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidCorpus(f"{path.name}: not UTF-8 text (byte {error.start})") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise InvalidCorpus(f"{path.name}, line {error.lineno}: not JSON ({error.msg})") from error
    except RecursionError as error:
        raise InvalidCorpus(f"{path.name}: nested too deeply") from error


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the file, row) of a CSV or a tab-separated table with a header, a JSONL, or a JSON list."""
    rows: Iterable[tuple[str, Any]]
    if path.suffix == ".csv":
        rows = _table(path)
    elif path.suffix == ".jsonl":
        rows = _json_lines(path)
    else:
        data = _json(path)
        if not isinstance(data, list):
            raise InvalidCorpus(f"{path.name}: not a list")
        rows = ((f"{path.name}, entry {number}", row) for number, row in enumerate(data, start=1))
    for where, row in rows:
        if not isinstance(row, dict):
            raise InvalidCorpus(f"{where}: not an object")
        yield where, row


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path.name}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidCorpus(f"{path.name}, line {number}: not JSON") from error


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    text = _read(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
    try:
        for row in reader:
            yield f"{path.name}, line {reader.line_num}", row
    except csv.Error as error:
        raise InvalidCorpus(f"{path.name}, line {reader.reader.line_num}: {error}") from error


def _ids(path: Path) -> dict[str, None]:
    """The ids of a list file, one a line, in its order."""
    return dict.fromkeys(line.strip() for line in _read(path).split("\n") if line.strip())


def _lists(root: Path, captions: Captions, names: dict[str, str], allow_missing: bool) -> Splits:
    paths = {split: _find(root, name) for split, name in names.items()}
    return {split: _of(_ids(path), captions, path, allow_missing) for split, path in paths.items()}


def _of(listed: dict[str, None], captions: Captions, path: Path, allow_missing: bool) -> Captions:
    """The captions of the videos that the file `path` lists; with `allow_missing`, of those that have some."""
    _filled(listed, path)
    if silent := [video for video in listed if video not in captions]:
        reason = f"{path.name}: {len(silent)} of its videos have no captions: {named(silent)}"
        if not allow_missing or len(silent) == len(listed):
            raise InvalidCorpus(reason)
        logger.warning("%s; left out", reason)
    return {video: captions[video] for video in listed if video in captions}


def _by_id(path: Path) -> Captions:
    """The captions of {id: [text, …]}, {id: {"enCap": […]}} or rows of {"videoID", "enCap"}; a text may be its words."""
    data: Any = None
    if path.suffix == ".pkl":
        data = _unpickled(path)
    elif path.suffix == ".json":
        data = _json(path)
    found = Captions()
    if isinstance(data, dict):
        for video, value in data.items():
            where = f"{path.name}, {video!r}"
            found[str(video)] = _texts(_field(value, "enCap", list, where) if isinstance(value, dict) else value, where)
    else:
        for where, row in _rows(path):
            found[_field(row, "videoID", str, where)] = _texts(row.get("enCap"), where)
    return _filled(found, path)


class _PlainUnpickler(pickle.Unpickler):
    """Knows lists, tuples, dicts, strings and numbers, which need no import: nothing can be called."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidCorpus(
            f"{path.name}: not a pickle of plain lists and strings ({reason}); put its captions into "
            "raw-captions.json as {id: [caption, …]} on a machine where you trust it"
        ) from error
    if not isinstance(data, dict):
        raise InvalidCorpus(f"{path.name}: not a dict of captions by video")
    return data


def _paragraphs(sentences: Iterable[tuple[str, str, Any]], path: Path) -> Captions:
    """All sentences of a video, joined in the order of the file."""
    found = Captions()
    for where, video, sentence in sentences:
        if not isinstance(sentence, str):
            raise InvalidCorpus(f"{where}: a caption of {video!r} is not text")
        found.setdefault(video, []).append(sentence)
    joined = {video: [_clean(" ".join(texts), f"{path.name}, {video!r}")] for video, texts in found.items()}
    return _filled(joined, path)


def _texts(values: Any, where: str) -> list[str]:
    if not isinstance(values, (list, tuple)) or not values:
        raise InvalidCorpus(f"{where}: no list of captions")
    return [_clean(value, where) for value in values]


def _clean(text: Any, where: str) -> str:
    if isinstance(text, (list, tuple)) and all(isinstance(word, str) for word in text):
        text = " ".join(text)
    if not isinstance(text, str):
        raise InvalidCorpus(f"{where}: a caption is not text")
    if not (clean := " ".join(text.split())):
        raise InvalidCorpus(f"{where}: an empty caption")
    return clean


def _field(row: Any, name: str, kind: type, where: str) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind) or value == "":
        raise InvalidCorpus(f"{where}: needs {name!r}")
    return value


def _filled(found: Videos, path: Path) -> Videos:
    if not found:
        raise InvalidCorpus(f"{path.name}: no videos in it")
    return found


def named(videos: Sequence[str], show: Callable[[str], str] = repr) -> str:
    """The first few `videos`, and how many more there are."""
    more = f" and {len(videos) - NAMED} more" if len(videos) > NAMED else ""
    return ", ".join(show(video) for video in videos[:NAMED]) + more
