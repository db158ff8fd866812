"""What the decoder reads passes the first look, also where a file is cut; what it can never read does not."""

import io
import random
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image
from videos import write_sound, write_video

from indexer.decode import DecodeError, decode
from indexer.formats import DEMUXERS, HEAD_BYTES, VIDEO_SUFFIXES, looks_like_video
from service.videos.incoming import SNIFF_BYTES, UnsupportedMedia, check_container

KINDS: dict[str, dict[str, Any]] = {
    "a.mp4": {},
    "a.mov": {},
    "a.3gp": {"codec": "h263", "size": (176, 144)},
    "a.ismv": {},
    "a.mkv": {},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "a.ts": {},
    "a.m2ts": {"container_options": {"mpegts_m2ts_mode": "1"}},
    "a.mpg": {"codec": "mpeg2video"},
    "a.vob": {"codec": "mpeg2video"},
    "a.m2v": {"codec": "mpeg2video"},
    "a.m1v": {"codec": "mpeg1video"},
    "a.m4v": {"codec": "mpeg4"},
    "a.h264": {},
    "a.hevc": {"codec": "libx265"},
    "a.flv": {"codec": "flv"},
    "a.wmv": {"codec": "wmv2"},
    "a.gif": {"codec": "gif", "pixels": "rgb8", "fps": 10},
    "a.ivf": {"codec": "libvpx-vp9"},
    "a.mxf": {"codec": "mpeg2video"},
    "a.dv": {"codec": "dvvideo", "size": (720, 576)},
    "a.rm": {"codec": "rv20", "size": (176, 144)},
    "a.wtv": {"codec": "mpeg2video"},
    "a.nut": {},
    "a.y4m": {"codec": "wrapped_avframe"},
}
CUT = ["a.ts", "a.m2ts", "a.mpg", "a.h264", "a.m2v"]


def decodes(path: Path) -> bool:
    out = path.with_name(f"out-{path.name}")
    out.mkdir()
    try:
        return bool(decode(path, out).segments)
    except DecodeError:
        return False


def passes(path: Path) -> bool:
    """As an upload."""
    try:
        check_container(path.read_bytes()[:SNIFF_BYTES])
    except UnsupportedMedia:
        return False
    return True


@pytest.mark.parametrize("name", KINDS)
def test_each_container_is_decoded_and_passes_the_first_look(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, **{"seconds": 0.6, **KINDS[name]})
    assert decodes(path)
    assert passes(path)
    assert path.suffix in VIDEO_SUFFIXES


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_a_recording_that_is_cut_anywhere_passes_if_it_is_decoded(tmp_path: Path, name: str, cut: int) -> None:
    path = write_video(tmp_path / name, **{"seconds": 4, **KINDS[name]})
    path.write_bytes(path.read_bytes()[cut:])
    assert decodes(path) and passes(path)


def test_what_holds_no_video_does_not_pass(tmp_path: Path) -> None:
    def picture(kind: str) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (640, 480), (9, 99, 9)).save(file, kind)
        return file.getvalue()

    others = [b"", b"G", b"Good day. " * 500, b"PK\x03\x04" + bytes(5000), bytes(5000), b"%PDF-1.7\n" * 400]
    others += [picture(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")]
    others += [write_sound(tmp_path / "a.wav").read_bytes(), random.Random(1).randbytes(HEAD_BYTES)]
    assert [other[:20] for other in others if looks_like_video(other[:HEAD_BYTES])] == []


def test_every_name_in_the_list_is_a_demuxer_that_ffmpeg_has() -> None:
    for name in DEMUXERS.split(","):
        av.ContainerFormat(name, "r")
