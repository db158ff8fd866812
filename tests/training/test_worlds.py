import os
import re
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from demo.drawing import COLOURS, FPS, SHAPES
from demo.worlds import WORLDS, scenes, write_clip, write_world


@pytest.mark.parametrize("world", WORLDS)
def test_scenes_are_the_same_for_a_seed_and_told_apart_by_every_phrasing(world: str) -> None:
    drawn = scenes(world, 300, 5)
    assert drawn == scenes(world, 300, 5)
    assert drawn != scenes(world, 300, 6)
    captions = [caption for scene in drawn for caption in scene.captions]
    assert len(set(captions)) == len(captions) == 900


@pytest.mark.parametrize("world", WORLDS)
def test_a_clip_is_a_real_mp4_that_shows_its_scene(world: str, tmp_path: Path) -> None:
    scene = scenes(world, 1, 1)[0]
    write_clip(scene, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert 5 <= len(frames) / FPS <= 8
    assert len(frames) == round(scene.duration * FPS)
    difference = np.abs(frames[20].astype(float) - scene.frame(2.0)).mean()
    assert difference < 12
    assert np.abs(frames[0].astype(float) - frames[25]).mean() > 0.2, "something moves"


def test_the_shifted_worlds_speak_another_language() -> None:
    """Of daylight's words, the night camera keeps the colours, which look otherwise there, and the plan the shapes.

    The archive keeps them all and adds none, but tells in another way: no caption is one of daylight's.
    """
    function_words = {"a", "and", "the", "in", "of", "on", "at", "with", "above", "before", "part"}
    vocabulary = {
        world: {w for s in scenes(world, 200, 0) for c in s.captions for w in re.findall("[a-z0-9]+", c)} - function_words
        for world in WORLDS
    }
    assert vocabulary["daylight"] & vocabulary["nightwatch"] == set(COLOURS)
    assert vocabulary["daylight"] & vocabulary["blueprint"] == set(SHAPES)
    assert not vocabulary["nightwatch"] & vocabulary["blueprint"]
    assert vocabulary["archive"] == vocabulary["daylight"]
    scene = scenes("archive", 1, 0)[0]
    assert not set(scene.captions) & set(replace(scene, world="daylight").captions)


def test_writing_a_world_again_writes_nothing_again(tmp_path: Path) -> None:
    done: list[int] = []
    captions = write_world(tmp_path, "blueprint", 3, 9, done.append)
    assert done == [1, 2, 3]
    assert len(captions.read_text().splitlines()) == 3
    stamps = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob("*.mp4")}
    assert len(stamps) == 3
    next(iter(stamps)).unlink()
    write_world(tmp_path, "blueprint", 3, 9)
    again = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob("*.mp4")}
    assert sum(again[path] == stamps[path] for path in stamps) == 2
