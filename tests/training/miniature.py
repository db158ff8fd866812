"""The published data sets in miniature: the same files in the same formats, with small real videos."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # (height, width, 3) RGB

SIZE = (96, 64)  # width and height in pixels
FPS = 10
VIDEOS = {"train": 12, "validation": 3, "test": 4}
COLOURS = {
    "red": (210, 40, 40), "green": (40, 160, 70), "blue": (45, 90, 215), "yellow": (250, 222, 60),
    "white": (246, 246, 246), "orange": (245, 140, 30), "purple": (135, 60, 180),
}  # fmt: skip
PATTERNS = ("plain", "striped", "halved")
LOOKS = sorted(product(COLOURS, PATTERNS), key=lambda look: list(product(COLOURS, PATTERNS)).index(look) * 8 % 21)


def picture(number: int) -> Picture:
    """What video `number` shows; no two of the first 21 look alike, nor do their captions read alike."""
    colour, pattern = LOOKS[number % len(LOOKS)]
    shown = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    shown[:] = COLOURS[colour]
    if pattern == "striped":
        shown[:, np.arange(SIZE[0]) // 8 % 2 == 1] = 0
    elif pattern == "halved":
        shown[SIZE[1] // 2 :] = 0
    return shown


def captions(number: int, count: int = 2) -> list[str]:
    colour, pattern = LOOKS[number % len(LOOKS)]
    phrasings = (f"a {pattern} {colour} picture", f"the screen is {colour} and {pattern}", f"{pattern} {colour} colour")
    return [phrasings[n % 3] for n in range(count)]


def write_clip(path: Path, shown: Picture | Callable[[float], Picture], seconds: float = 1.0, fps: int = FPS) -> Path:
    """An H.264 file of one picture, or of `shown(seconds)`; the name's ending picks the container."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for n in range(round(seconds * fps)):
            frame = shown(n / fps) if callable(shown) else shown
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def miniature(name: str, folder: Path, videos: Mapping[str, int] = VIDEOS) -> Path:
    """Writes the data set `name` (as in `training.corpora.CORPORA`) with that many videos a split; returns its folder.

    Video `n`, counted through train, validation and test, shows `picture(n)` and its captions are from `captions(n)`.
    Where a data set publishes no validation split (msrvtt, activitynet), those videos are not written.
    """
    root = folder / name
    root.mkdir(parents=True)
    counts = [videos.get(split, 0) for split in ("train", "validation", "test")]
    numbers = np.split(np.arange(sum(counts)), np.cumsum(counts)[:2])
    WRITERS[name](root, *(part.tolist() for part in numbers))
    return root


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines))


def _msrvtt(root: Path, train: list[int], _: list[int], test: list[int]) -> None:
    write_table(root / "MSRVTT_train.9k.csv", [{"video_id": f"video{n}"} for n in train])
    write_table(root / "MSRVTT_train.7k.csv", [{"video_id": f"video{n}"} for n in train[: len(train) * 7 // 9]])
    tests = [
        {"key": f"ret{i}", "vid_key": f"msr{n}", "video_id": f"video{n}", "sentence": captions(n)[0]}
        for i, n in enumerate(test)
    ]
    write_table(root / "MSRVTT_JSFUSION_test.csv", tests)
    both = train + test
    sentences = [
        {"caption": caption, "video_id": f"video{n}", "sen_id": 20 * i + c}
        for i, n in enumerate(both)
        for c, caption in enumerate(captions(n, 3))
    ]
    listed = [{"video_id": f"video{n}", "category": 9, "url": "", "start time": 0.0, "end time": 1.0, "id": n} for n in both]
    write_json(root / "MSRVTT_data.json", {"info": {}, "videos": listed, "sentences": sentences})
    for n in both:
        write_clip(root / "videos" / "all" / f"video{n}.mp4", picture(n))


def _msvd(root: Path, train: list[int], validation: list[int], test: list[int]) -> None:
    ids = {n: f"-4wsu_CjD{n:02d}_5_{n}" for n in train + validation + test}
    for short, part in (("train", train), ("val", validation), ("test", test)):
        write_lines(root / f"{short}_list.txt", [ids[n] for n in part])
    write_json(root / "captions_msvd.json", {video: captions(n, 3) for n, video in ids.items()})
    for n, video in ids.items():
        write_clip(root / "YouTubeClips" / f"{video}.avi", picture(n))


def _vatex(root: Path, train: list[int], validation: list[int], test: list[int]) -> None:
    ids = {n: f"Ptf_2VRj-{n:02d}_000122_000132" for n in train + validation + test}
    for name, part in (("train", train), ("val", validation), ("test", test), ("test1k5_sec", test[:1] + validation[:1])):
        write_lines(root / f"{name}_list.txt", [ids[n] for n in part])
    for name, part in (("vatex_training_v1.0", train), ("vatex_validation_v1.0", validation + test)):
        rows = [{"videoID": ids[n], "enCap": captions(n, 3), "chCap": ["一张图片"]} for n in part]
        (root / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    for n, video in ids.items():
        write_clip(root / "videos" / f"{video}.mp4", picture(n))


def _didemo(root: Path, train: list[int], validation: list[int], test: list[int]) -> None:
    for short, part in (("train", train), ("val", validation), ("test", test)):
        videos = {n: f"{n:08d}@N00_28046168_{n:08x}{('.mov', '.mp4', '.avi')[n % 3]}" for n in part}
        rows = [
            {"num_segments": 6, "description": captions(n)[turn], "times": [[0, 0]] * 4, "video": videos[n], "annotation_id": n}
            for turn in range(2)  # the descriptions of a video do not stand together
            for n in part
        ]
        write_json(root / f"{short}_data.json", rows)
        for n, video in videos.items():
            write_clip(root / "videos" / video, picture(n))


def _activitynet(root: Path, train: list[int], _: list[int], test: list[int]) -> None:
    for name, part in (("train", train), ("val_1", test)):
        rows = {
            f"v_uqiMw7tQ{n:03d}": {
                "duration": 1.0,
                "timestamps": [[0, 0.5], [0.5, 1.0]],
                "sentences": [captions(n)[0] + ".", " " + captions(n)[1] + "."],
            }
            for n in part
        }
        write_json(root / f"{name}.json", rows)
        for n, video in zip(part, rows, strict=True):
            write_clip(root / "videos" / f"{video}.mp4", picture(n))


def _jsonl(root: Path, train: list[int], validation: list[int], test: list[int]) -> None:
    lines = []
    for split, part in (("train", train), ("validation", validation), ("test", test)):
        for n in part:
            text = {"caption": captions(n)[0]} if n % 2 else {"captions": captions(n)}
            lines.append(json.dumps({"video": f"clip {n}.mp4"} | text | ({} if split == "train" else {"split": split})))
            write_clip(root / "videos" / f"clip {n}.mp4", picture(n))
    write_lines(root / "captions.jsonl", lines)


WRITERS: dict[str, Callable[[Path, list[int], list[int], list[int]], None]] = {
    "msrvtt": _msrvtt,
    "msvd": _msvd,
    "vatex": _vatex,
    "didemo": _didemo,
    "activitynet": _activitynet,
    "jsonl": _jsonl,
}
