"""Real files of every kind go in; what comes out is checked by the time that the pictures themselves show."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from videos import clock, corner, garbled, sideways, time_shown, truncated, write_sound, write_video

from indexer.decode import DecodedSegment, DecodedVideo, DecodeError, Decoder, Sampling, decode, probe
from indexer.sandbox import ENVIRONMENT


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def centres(segment: DecodedSegment) -> np.ndarray:
    slices = np.linspace(segment.start, segment.end, len(segment.frame_files) + 1)
    return (slices[:-1] + slices[1:]) / 2


def shown(segment: DecodedSegment, out: Path) -> np.ndarray:
    return np.array([time_shown(out / name) for name in segment.frame_files])


def code_of(path: Path, out: Path, **sampling: Any) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(path, out, replace(Sampling(), **sampling))
    assert caught.value.detail.endswith(".") and str(path.parent) not in caught.value.detail
    return caught.value.code


KINDS = [
    ("a.mp4", "libx264", "decord"),
    ("a.mkv", "libx264", "decord"),
    ("a.flv", "libx264", "pyav"),
    ("a.ts", "libx264", "pyav"),  # the first stamp is not 0
    ("a.h264", "libx264", "pyav"),  # no stamps at all
    ("reordered.avi", "libx264", "pyav"),  # AVI stamps are those of the file's order; decord answers with wrong frames
    ("hevc.mp4", "libx265", "decord"),
    ("vp9.webm", "libvpx-vp9", "decord"),
    ("av1.mp4", "libsvtav1", "pyav"),
    ("a.avi", "mpeg4", "decord"),
    ("stream.mpg", "mpeg2video", "pyav"),
]


def test_no_kind_needs_another_process_or_thread_which_the_cage_forbids(tmp_path: Path) -> None:
    story = """
import os, resource, sys
from pathlib import Path
from typing import Any
from indexer.decode import decode
from indexer.sandbox_child import import_decoders
import_decoders("pyav")
if os.geteuid() == 0:  # root is exempt
    os.setgroups([])
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
for name in sys.argv[1:]:
    os.mkdir(f"{name}.out")
    print(name, decode(Path(name), Path(f"{name}.out")).facts.decoder)
"""
    options = {"x264-params": "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"}
    names = [write_video(tmp_path / name, codec=codec).name for name, codec, _ in KINDS]
    names.append(write_video(tmp_path / "hdr.mp4", pixels="yuv420p10le", options=options).name)
    tmp_path.chmod(0o777)
    for name in names:
        (tmp_path / name).chmod(0o644)
    environment = {**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", story, *names]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.stdout.split("\n") == [*(f"{name} pyav" for name in names), ""], told.stderr


@pytest.mark.parametrize(("name", "codec", "decoder"), KINDS, ids=[name for name, _, _ in KINDS])
def test_a_clip_of_any_kind_gives_the_frames_at_the_centres_of_twelve_slices(
    tmp_path: Path, out: Path, name: str, codec: str, decoder: str
) -> None:
    video = decode(write_video(tmp_path / name, codec=codec), out, decoder="auto")
    [segment] = video.segments
    facts = video.facts
    assert (facts.width, facts.height, facts.frames, facts.decoder) == (160, 120, 50, decoder)
    assert facts.duration == pytest.approx(2.0, abs=0.05) and facts.fps == pytest.approx(25, abs=0.7)
    assert (segment.start, segment.end) == (0.0, facts.duration)
    assert len(segment.frame_files) == 12
    assert np.abs(shown(segment, out) - centres(segment)).max() < 0.2
    assert {file.name for file in out.iterdir()} == {*segment.frame_files, segment.thumbnail_file}


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
def test_a_long_video_is_cut_into_equal_segments_each_with_its_own_frames(tmp_path: Path, out: Path, decoder: Decoder) -> None:
    video = decode(write_video(tmp_path / "long.mp4", seconds=95, gop=250), out, decoder=decoder)
    bounds = [(segment.start, segment.end) for segment in video.segments]
    assert np.allclose(bounds, [(0, 23.75), (23.75, 47.5), (47.5, 71.25), (71.25, 95)])
    assert video.facts.decoder == ("decord" if decoder == "auto" else "pyav")
    for segment in video.segments:
        assert np.abs(shown(segment, out) - centres(segment)).max() < 0.15
        assert abs(time_shown(out / segment.thumbnail_file) - centres(segment)[6]) < 0.15


def test_a_video_as_long_as_a_segment_is_one_segment(tmp_path: Path, out: Path) -> None:
    path = write_video(tmp_path / "a.mp4", seconds=2)
    assert len(decode(path, out, Sampling(segment_seconds=2.0)).segments) == 1


def test_decord_and_pyav_give_the_same_files(tmp_path: Path, out: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    video = decode(path, out, decoder="auto")
    again = tmp_path / "again"
    again.mkdir()
    other = decode(path, again)
    assert (video.facts.decoder, other.facts.decoder) == ("decord", "pyav")
    assert other == replace(video, facts=replace(video.facts, decoder="pyav"))
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in out.iterdir())


def test_decord_is_not_asked_where_pictures_are_not_shown_as_stored(tmp_path: Path, out: Path) -> None:
    turned = write_video(tmp_path / "a.mp4", picture=corner, rotation=90)
    assert decode(turned, out, decoder="auto").facts.decoder == "pyav"
    with pytest.raises(DecodeError, match="unsupported_media"):
        decode(turned, out, decoder="decord")


def test_a_video_of_too_many_segments_is_refused_and_says_how_many(tmp_path: Path, out: Path) -> None:
    path = write_video(tmp_path / "a.mp4", seconds=5)
    assert len(decode(path, out, Sampling(segment_seconds=1, max_segments=5)).segments) == 5
    with pytest.raises(DecodeError, match=r"too_many_segments: .* 5 segments of 1 seconds; the limit is 4"):
        decode(path, out, Sampling(segment_seconds=1, max_segments=4))


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
@pytest.mark.parametrize(("rotation", "size"), [(-90, (160, 120)), (90, (160, 120)), (180, (160, 120))])
def test_a_rotated_video_comes_out_as_it_is_shown(
    tmp_path: Path, out: Path, rotation: int, size: tuple[int, int], decoder: Decoder
) -> None:
    def stored(seconds: float, size: tuple[int, int]) -> np.ndarray:
        upright = corner(seconds, size if rotation == 180 else size[::-1])
        return np.ascontiguousarray(np.rot90(upright, -rotation // 90))

    video = decode(write_video(tmp_path / "a.mp4", picture=stored, rotation=rotation), out, decoder=decoder)
    expected = size if rotation == 180 else size[::-1]
    assert (video.facts.width, video.facts.height) == expected
    with Image.open(out / video.segments[0].frame_files[3]) as image:
        assert image.size == expected
        picture = np.asarray(image).astype(int)
    assert picture[5, 5, 0] > 230 > 30 > picture[5, 5, 1]
    assert np.abs(picture[-5, -5] - 128).max() < 10


FULL = 1 << 16
MATRICES = {  # (a, b, c, d), and how the stored picture is turned into the one that is shown
    "mirrored": ((-FULL, 0, 0, FULL), lambda stored: stored[:, ::-1]),
    "upside down": ((FULL, 0, 0, -FULL), lambda stored: stored[::-1]),
    "half a turn": ((-FULL, 0, 0, -FULL), lambda stored: stored[::-1, ::-1]),
    "rows are columns": ((0, FULL, FULL, 0), lambda stored: stored.transpose(1, 0, 2)),
    "a quarter turn and mirrored": ((0, -FULL, -FULL, 0), lambda stored: stored[::-1, ::-1].transpose(1, 0, 2)),
    "a quarter turn": ((0, FULL, -FULL, 0), lambda stored: np.rot90(stored, -1)),
}


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
@pytest.mark.parametrize(("matrix", "show"), MATRICES.values(), ids=MATRICES)
def test_a_display_matrix_is_applied_mirror_and_all(
    tmp_path: Path, out: Path, matrix: tuple[int, ...], show: Callable[[np.ndarray], np.ndarray], decoder: Decoder
) -> None:
    a, b, c, d = matrix
    path = write_video(tmp_path / "a.mp4", picture=corner, seconds=0.4, matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    video = decode(path, out, decoder=decoder)
    expected = show(corner(0, (160, 120))).astype(int)
    assert (video.facts.height, video.facts.width) == expected.shape[:2]
    with Image.open(out / video.segments[0].frame_files[5]) as image:
        assert np.abs(np.asarray(image).astype(int) - expected).mean() < 5


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
@pytest.mark.parametrize(
    ("aspect", "rotation", "size", "shown"),
    [
        (Fraction(64, 45), 0, (720, 576), (1024, 576)),  # a DVD of a wide film
        (Fraction(8, 9), 0, (720, 480), (640, 480)),
        (Fraction(4, 3), -90, (144, 108), (108, 192)),
        (Fraction(1, 400), 0, (160, 120), (160, 120)),  # garbage
    ],
)
def test_pixels_that_are_not_square_are_shown_in_their_shape(
    tmp_path: Path, out: Path, aspect: Fraction, rotation: int, size: tuple[int, int], shown: tuple[int, int], decoder: Decoder
) -> None:
    path = write_video(tmp_path / "a.mp4", size=size, times=[0, 0.04], aspect=aspect, rotation=rotation)
    video = decode(path, out, decoder=decoder)
    assert (video.facts.width, video.facts.height) == shown
    for name in (video.segments[0].frame_files[0], video.segments[0].thumbnail_file):
        with Image.open(out / name) as image:
            assert image.width / image.height == pytest.approx(shown[0] / shown[1], rel=0.02)


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
@pytest.mark.parametrize(("transfer", "codes"), [("smpte2084", (0.58, 0.38)), ("arib-std-b67", (0.75, 0.38))])
def test_hdr_is_shown_as_bright_as_a_standard_screen_would(
    tmp_path: Path, out: Path, transfer: str, codes: tuple[float, float], decoder: Decoder
) -> None:
    """The codes are those of white (203 nits) and of the grey card (26 nits) in BT.2408, table 1."""

    def halves(seconds: float, size: tuple[int, int]) -> np.ndarray:
        picture = np.full((size[1], size[0], 3), round(255 * codes[0]), np.uint8)
        picture[:, size[0] // 2 :] = round(255 * codes[1])
        return picture

    options = {"x264-params": f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"}
    path = write_video(tmp_path / "a.mp4", pixels="yuv420p10le", times=[0, 0.04], picture=halves, options=options)
    video = decode(path, out, decoder=decoder)
    with Image.open(out / video.segments[0].frame_files[0]) as image:
        picture = np.asarray(image).astype(float)
    assert picture[:, :70].mean() > 235
    assert picture[:, 90:].mean() == pytest.approx(100, abs=5)  # sRGB of 26 / 203


def test_a_display_matrix_of_garbage_turns_nothing(tmp_path: Path, out: Path) -> None:
    path = write_video(tmp_path / "a.mp4", picture=corner, matrix=[123456, -7, 0, 99999999, 5, 0, 0, 0, 1 << 30])
    facts = decode(path, out).facts
    assert (facts.width, facts.height) == (160, 120)


@pytest.mark.parametrize("decoder", ["pyav", "auto"])
def test_a_variable_frame_rate_is_sampled_by_time_and_not_by_number(tmp_path: Path, out: Path, decoder: Decoder) -> None:
    times = [0, 0.04, 0.08, 0.12, 1.0, 3.0, 3.04, 6.0]
    video = decode(write_video(tmp_path / "a.mp4", times=times), out, decoder=decoder)
    expected = [max(time for time in times if time <= centre) for centre in centres(video.segments[0])]
    assert np.abs(shown(video.segments[0], out) - expected).max() < 0.1


def leaping(path: Path, leap: Callable[[float], float]) -> Path:
    """The packets of `path` (Matroska), each stamp moved by `leap(seconds)` seconds."""
    moved = path.with_name(f"leaping-{path.name}")
    with av.open(str(path)) as source, av.open(str(moved), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts += round(leap(float(packet.pts * stream.time_base)) / stream.time_base)
                packet.stream = copy
                target.mux(packet)
    return moved


LEAPS: dict[str, Callable[[float], float]] = {
    "one in the middle": lambda at: 4320.0 * (1.98 < at < 2.02),
    "the last stamp": lambda at: 4320.0 * (at > 3.95),
    "twenty hours from the middle on": lambda at: 72_000.0 * (at >= 2),
    "ten minutes, twice": lambda at: 600.0 * ((at >= 1) + (at >= 3)),
    "the first stamp": lambda at: 5000.0 * (at >= 0.04),
}


@pytest.mark.parametrize("leap", LEAPS.values(), ids=LEAPS)
@pytest.mark.parametrize("decoder", ["pyav", "auto"])
def test_stamps_that_leap_make_a_clip_no_longer_than_what_is_shown(
    tmp_path: Path, out: Path, leap: Callable[[float], float], decoder: Decoder
) -> None:
    sane = write_video(tmp_path / "a.mkv", codec="mpeg4", seconds=4)
    assert probe(sane).duration == pytest.approx(4.0)
    path = leaping(sane, leap)
    video = decode(path, out, decoder=decoder)
    assert video.facts.duration == pytest.approx(4.0, abs=0.05) and video.facts.frames == 100
    assert probe(path).duration == video.facts.duration
    [segment] = video.segments
    assert np.abs(shown(segment, out) - centres(segment)).max() < 0.2


def test_a_recording_that_starts_again_is_as_long_as_both_parts(tmp_path: Path, out: Path) -> None:
    parts = [
        write_video(tmp_path / f"{n}.ts", times=list(np.arange(50) / 25), picture=lambda at, size, n=n: clock(at + 2 * n, size))
        for n in range(2)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    video = decode(path, out)
    assert video.facts.duration == pytest.approx(4.0, abs=0.2)
    assert np.abs(shown(video.segments[0], out) - centres(video.segments[0])).max() < 0.25


def test_pauses_that_a_screen_recording_has_are_kept(tmp_path: Path, out: Path) -> None:
    assert probe(write_video(tmp_path / "a.mkv", times=[0, 0.04, 10, 10.04, 30, 55.5])).duration == pytest.approx(55.5, abs=0.1)
    assert probe(write_video(tmp_path / "b.mkv", times=[0, 600, 1200, 1800], picture=corner)).duration > 1800


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_a_single_frame_is_repeated_twelve_times(tmp_path: Path, out: Path, name: str) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    video = decode(write_video(tmp_path / name, codec=codec, times=[0]), out)
    assert video.facts.frames == 1 and video.facts.duration > 0
    assert len({(out / name).read_bytes() for name in video.segments[0].frame_files}) == 1
    assert len(video.segments[0].frame_files) == 12


def test_odd_and_tiny_pictures_are_kept_as_they_are(tmp_path: Path, out: Path) -> None:
    odd = decode(write_video(tmp_path / "a.webm", codec="libvpx-vp9", size=(161, 121)), out)
    assert (odd.facts.width, odd.facts.height) == (161, 121)
    tiny = decode(write_video(tmp_path / "a.mkv", codec="ffv1", pixels="yuv444p", size=(1, 1)), out)
    with Image.open(out / tiny.segments[0].thumbnail_file) as image:
        assert image.size == (1, 1)


def test_large_pictures_are_scaled_down_and_small_ones_never_up(tmp_path: Path, out: Path) -> None:
    video = decode(write_video(tmp_path / "a.mp4", size=(960, 540), seconds=0.4), out)
    with Image.open(out / video.segments[0].frame_files[0]) as frame, Image.open(out / "000-thumb.jpg") as thumbnail:
        assert (frame.format, frame.size, thumbnail.size) == ("JPEG", (455, 256), (320, 180))
    small = decode(write_video(tmp_path / "b.mp4"), out)
    with Image.open(out / small.segments[0].frame_files[0]) as frame, Image.open(out / "000-thumb.jpg") as thumbnail:
        assert frame.size == thumbnail.size == (160, 120)


@pytest.mark.parametrize("size", [(4096, 2), (2, 4096), (2048, 400)])
def test_of_an_extreme_picture_only_the_middle_is_cached(tmp_path: Path, out: Path, size: tuple[int, int]) -> None:
    path = write_video(tmp_path / "a.mkv", codec="ffv1", pixels="yuv444p", size=size, times=[0, 0.04])
    video = decode(path, out)
    assert (video.facts.width, video.facts.height) == size
    for name in (video.segments[0].frame_files[0], video.segments[0].thumbnail_file):
        with Image.open(out / name) as image:
            assert max(image.size) <= 4 * min(image.size) + 4


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_of_a_truncated_file_the_real_end_counts_and_not_the_header(tmp_path: Path, out: Path, name: str, codec: str) -> None:
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = truncated(write_video(tmp_path / name, codec=codec, seconds=4, container_options=options), 0.6)
    video = decode(path, out)
    assert 1 < video.facts.duration < 3.5
    assert video.segments[-1].end == video.facts.duration
    assert np.abs(shown(video.segments[0], out) - centres(video.segments[0])).max() < 0.25


def test_a_file_broken_in_its_middle_keeps_the_frames_before_and_after(tmp_path: Path, out: Path) -> None:
    path = write_video(tmp_path / "a.mp4", seconds=8, container_options={"movflags": "faststart"})
    video = decode(garbled(path, 0.5, 0.6), out)
    assert video.facts.decoder == "pyav" and video.facts.frames < 200
    error = np.abs(shown(video.segments[0], out) - centres(video.segments[0]))
    assert error[0] < 0.2 and error[-2:].max() < 0.2 and np.median(error) < 0.2


def test_a_header_without_duration_is_no_obstacle(tmp_path: Path, out: Path) -> None:
    video = decode(write_video(tmp_path / "a.webm", codec="libvpx-vp9", container_options={"live": "1"}), out)
    assert video.facts.duration == pytest.approx(2.0) and video.facts.decoder == "pyav"


def test_what_is_not_a_video_says_so(tmp_path: Path, out: Path) -> None:
    text, empty, picture = tmp_path / "text.mp4", tmp_path / "empty.mp4", tmp_path / "picture.mp4"
    text.write_text("Dear sir, this is not a video.\n" * 100)
    empty.touch()
    Image.new("RGB", (64, 64)).save(picture, "JPEG")
    assert code_of(text, out) == code_of(picture, out) == code_of(write_sound(tmp_path / "a.m4a"), out) == "unsupported_media"
    assert code_of(empty, out) == "empty_file"


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8"])
def test_a_playlist_cannot_make_the_decoder_read_other_files(tmp_path: Path, out: Path, name: str) -> None:
    write_video(tmp_path / "other.mp4")
    playlist = tmp_path / name
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.mp4\n#EXT-X-ENDLIST\n"
    for text in (hls, "ffconcat version 1.0\nfile other.mp4\n"):
        playlist.write_text(text)
        assert code_of(playlist, out) == "unsupported_media"


def test_the_cover_of_a_song_is_not_a_video(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=44100), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24").reformat(format="yuvj420p")
        image.pts = 0
        container.mux([*cover.encode(image), *cover.encode(None)])
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate, silence.pts = 44100, 0
        container.mux([*sound.encode(silence), *sound.encode(None)])
    assert code_of(path, out) == "unsupported_media"


def test_an_encrypted_video_says_so(tmp_path: Path, out: Path) -> None:
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb"}
    path = write_video(tmp_path / "a.mp4", container_options=key | {"encryption_kid": "a7e61c373e219033c21091fa607bf3b8"})
    assert code_of(path, out) == "unsupported_media"


def test_a_video_without_one_frame_that_decodes_is_an_error_and_not_an_empty_video(tmp_path: Path, out: Path) -> None:
    options = {"movflags": "faststart"}
    garbage = garbled(write_video(tmp_path / "a.mp4", times=[0, 0.04], container_options=options), 0.55, 1.0)
    header = write_video(tmp_path / "b.mp4", container_options=options)
    header.write_bytes(header.read_bytes().partition(b"mdat")[0] + b"mdat")
    assert code_of(garbage, out) == code_of(header, out) == "no_frames"
    assert not list(out.iterdir())


def test_too_long_and_too_large_are_refused_before_any_frame_is_written(tmp_path: Path, out: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    assert code_of(path, out, max_seconds=1.5) == "video_too_long"
    assert code_of(path, out, max_pixels=160 * 119) == "video_too_large"
    wide = write_video(tmp_path / "b.mkv", codec="ffv1", pixels="yuv444p", size=(20_000, 1), times=[0])
    assert code_of(wide, out) == "video_too_large"
    assert not list(out.iterdir())


def test_probe_tells_the_facts_of_a_turned_video(tmp_path: Path) -> None:
    facts = probe(write_video(tmp_path / "a.mp4", picture=sideways, rotation=-90, codec="libx265"))
    assert (facts.duration, facts.width, facts.height, facts.fps) == (2.0, 120, 160, 25.0)
    assert (facts.codec, facts.frames) == ("hevc", 50) and "mp4" in facts.container


def test_the_result_survives_json_and_foreign_file_names_do_not(tmp_path: Path, out: Path) -> None:
    video = decode(write_video(tmp_path / "a.mp4", picture=clock), out)
    data = json.loads(json.dumps(video.to_dict()))
    assert DecodedVideo.from_dict(data) == video
    data["segments"][0]["thumbnail_file"] = "../../secret.jpg"
    with pytest.raises(ValueError, match="name"):
        DecodedVideo.from_dict(data)


def test_a_missing_file_is_our_fault_and_not_a_decode_error(tmp_path: Path, out: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "missing.mp4", out)
