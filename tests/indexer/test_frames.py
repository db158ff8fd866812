from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexer.decode import DecodedSegment, DecodedVideo, MediaFacts, reopen
from indexer.frames import DamagedFrames, FrameArchive, pack_frames

FACTS = MediaFacts(duration=60.0, width=80, height=60, fps=10.0, codec="h264", frames=600, container="mp4", decoder="decord")


def video(folder: Path, segments: int = 2, frames: int = 12) -> DecodedVideo:
    """Grey frames whose brightness counts up."""
    made = []
    for s in range(segments):
        names = tuple(f"{s:03d}-{f:02d}.jpg" for f in range(frames))
        for f, name in enumerate(names):
            Image.new("RGB", (80, 60), (10 * (s * frames + f),) * 3).save(folder / name, quality=95)
        made.append(DecodedSegment(30.0 * s, 30.0 * (s + 1), names, names[0]))
    return DecodedVideo(FACTS, tuple(made))


def test_frames_come_back_as_the_backbones_pixels(tmp_path: Path) -> None:
    archive = FrameArchive(pack_frames(video(tmp_path), tmp_path))
    assert [(s.start, s.end, len(s.frames)) for s in archive.segments] == [(0.0, 30.0, 12), (30.0, 60.0, 12)]
    pixels = archive.pixels(archive.segments[1].frames, 32)
    assert pixels.shape == (12, 3, 32, 32) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.mean(axis=(1, 2, 3)), [10 * (12 + f) for f in range(12)], atol=3)


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    decoded = video(tmp_path)
    assert pack_frames(decoded, tmp_path) == pack_frames(decoded, tmp_path)


def test_frames_between_two_moments_come_from_the_segments_that_meet_them(tmp_path: Path) -> None:
    archive = FrameArchive(pack_frames(video(tmp_path), tmp_path))
    assert archive.between(31.0, 40.0, 12) == archive.segments[1].frames
    assert archive.between(None, 20.0, 12) == archive.segments[0].frames
    whole = archive.between(None, None, 12)
    assert len(whole) == 12 and whole[0] in archive.segments[0].frames and whole[-1] in archive.segments[1].frames
    assert list(whole) == sorted(whole)
    assert archive.between(500.0, 600.0, 12) == whole, "a caption beyond the end tells of the whole video"


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    data = pack_frames(video(tmp_path), tmp_path)
    for broken in (b"", b"PK", data[:2000], data[: len(data) // 2]):
        with pytest.raises(DamagedFrames):
            FrameArchive(broken)
    flipped = bytearray(data)
    flipped[3000] ^= 0xFF
    with pytest.raises(DamagedFrames):
        archive = FrameArchive(bytes(flipped))
        archive.pixels(archive.between(None, None, 24), 32)


def test_a_picture_larger_than_any_cached_frame_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    decoded = video(tmp_path, segments=1, frames=1)
    for size in [(4097, 1024), (30_000, 30_000)]:  # the second is what Pillow calls a decompression bomb
        data = (tmp_path / "000-00.jpg").read_bytes()
        at = data.index(b"\xff\xc0") + 5
        height, width = size[1].to_bytes(2, "big"), size[0].to_bytes(2, "big")
        (tmp_path / "000-00.jpg").write_bytes(data[:at] + height + width + data[at + 4 :])
        archive = FrameArchive(pack_frames(decoded, tmp_path))
        with pytest.raises(DamagedFrames):
            archive.pixels(archive.segments[0].frames, 32)


def test_imported_frames_that_would_be_dear_are_written_anew_and_others_kept(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    decoded = video(source, segments=1, frames=3)
    Image.new("RGB", (3000, 2000), (0, 90, 0)).save(source / "000-01.jpg")
    Image.new("RGB", (80, 60), (0, 90, 0)).save(source / "000-02.jpg", progressive=True)
    archive = tmp_path / "frames.zip"
    archive.write_bytes(pack_frames(decoded, source))
    again = reopen(archive, out, FACTS)
    assert (out / "000-00.jpg").read_bytes() == (source / "000-00.jpg").read_bytes()
    with Image.open(out / "000-01.jpg") as large, Image.open(out / "000-02.jpg") as scans:
        assert large.size == (384, 256) and scans.size == (80, 60) and "progressive" not in scans.info
    assert FrameArchive(pack_frames(again, out)).pixels(again.segments[0].frame_files, 32).shape == (3, 3, 32, 32)
