"""The demo worlds: small animated scenes with a caption grammar, written as real MP4 files.

`daylight` is the world that the built-in backbone is trained on. `nightwatch` shows like scenes through a night camera with
false colours, in its operators' jargon: of daylight's words only the colours' names are left, and they look otherwise there.
`blueprint` draws them as plans in an engineer's words: only the shapes' names are left. Another look and another vocabulary:
what a frozen backbone cannot know and an adapter can learn. `archive` shows them on faded film, told in the sentences of a card
index and in daylight's words alone: a milder shift, as CLIP too has seen every word of the real data sets before.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from demo.drawing import (
    COLOURS,
    FPS,
    GROUNDS,
    LOOKS,
    SHAPES,
    SIDES,
    SIZE,
    SIZES,
    TEXTURES,
    Group,
    Picture,
    ground_of,
    spots,
    sprite_of,
)


@dataclass(frozen=True, slots=True)
class Language:
    """A world's words for the things of the grammar, and its sentences with the slots a, b and ground."""

    words: Mapping[str, str]
    counts: tuple[str, str, str]
    plurals: bool
    group: str
    sentences: tuple[str, ...]

    def tell(self, group: Group) -> str:
        noun = self.words[group.shape]
        if self.plurals and group.count > 1:
            noun += "es" if noun[-1] in "sx" else "s"
        return self.group.format(
            count=self.counts[group.count - 1],
            size=self.words[group.size],
            texture=self.words[group.texture],
            colour=self.words[group.colour],
            noun=noun,
            place=self.words[group.place],
        )


def _words(text: str) -> dict[str, str]:
    """`thing:word` pairs apart by commas."""
    return {thing.strip(): word.strip() for thing, word in (pair.split(":") for pair in text.split(","))}


LANGUAGES = {
    "daylight": Language(
        words=_words(
            "ball:ball, box:box, pyramid:pyramid, star:star, ring:ring, heart:heart, cross:cross, diamond:diamond,"
            "red:red, orange:orange, yellow:yellow, green:green, blue:blue, purple:purple, white:white, black:black,"
            "plain:plain, striped:striped, dotted:dotted, chequered:chequered, small:small, large:large,"
            "left:on the left, right:on the right, top:at the top, bottom:at the bottom,"
            "meadow:in a green meadow, beach:on a sandy beach, snow:in the snow, sea:above the sea,"
            "wall:before a brick wall, desert:in a desert at sunset"
        ),
        counts=("a", "two", "three"),
        plurals=True,
        group="{count} {size} {texture} {colour} {noun} {place}",
        sentences=(
            "{a} and {b}, {ground}",
            "{ground}: {a}, {b}",
            "a scene {ground} with {b} and {a}",
        ),
    ),
    "nightwatch": Language(
        words=_words(
            "ball:bogey, box:crate, pyramid:tent, star:flare, ring:halo, heart:leaf, cross:drone, diamond:kite,"
            "red:red, orange:orange, yellow:yellow, green:green, blue:blue, purple:purple, white:white, black:black,"
            "plain:steady, striped:banded, dotted:speckled, chequered:gridded, small:minor, large:major,"
            "left:sector west, right:sector east, top:sector north, bottom:sector south,"
            "meadow:zone kilo, beach:zone lima, snow:zone oscar, sea:zone papa, wall:zone quebec, desert:zone tango"
        ),
        counts=("single", "dual", "triple"),
        plurals=False,
        group="{count} {size} {texture} {colour} {noun} {place}",
        sentences=(
            "contact {a}; {b}; {ground}",
            "{ground} report: {b}, also {a}",
            "tracking {a} plus {b} over {ground}",
        ),
    ),
    "blueprint": Language(
        words=_words(
            "ball:ball, box:box, pyramid:pyramid, star:star, ring:ring, heart:heart, cross:cross, diamond:diamond,"
            "red:magenta, orange:cerise, yellow:carmine, green:lime, blue:verdigris, purple:azure, white:sepia,"
            "black:chalk, plain:hollow, striped:ribbed, dotted:perforated, chequered:knurled, small:slim, large:heavy,"
            "left:port side, right:starboard side, top:upper view, bottom:lower view,"
            "meadow:squared sheet, beach:ruled sheet, snow:stippled sheet, sea:bare sheet, wall:isometric sheet,"
            "desert:polar sheet"
        ),
        counts=("1x", "2x", "3x"),
        plurals=False,
        group="{count} {size} {texture} {noun} {colour} ink {place}",
        sentences=(
            "{ground}, part {a}, part {b}",
            "assembly of {b} with {a}, {ground}",
            "detail {a} / {b} / {ground}",
        ),
    ),
}
LANGUAGES["archive"] = Language(  # daylight's words, every one, in the sentences of a card index
    words=LANGUAGES["daylight"].words,
    counts=("a", "two", "three"),
    plurals=True,
    group="{place}, {count} {size} {texture} {colour} {noun}",
    sentences=(
        "{ground}, {a}, {b}",
        "{b}, {a}, {ground}",
        "scene: {a}; {b}; {ground}",
    ),
)
WORLDS = tuple(LANGUAGES)


@dataclass(frozen=True, slots=True)
class Scene:
    """Two groups of objects before a ground, moving gently. `seed` decides motion, noise and length, never a caption."""

    world: str
    groups: tuple[Group, ...]
    ground: str
    seed: int

    @property
    def captions(self) -> tuple[str, ...]:
        """Phrasings that all tell everything that identifies the scene."""
        language = LANGUAGES[self.world]
        a, b = (language.tell(group) for group in self.groups)
        return tuple(s.format(a=a, b=b, ground=language.words[self.ground]) for s in language.sentences)

    @property
    def duration(self) -> float:
        """Seconds, from 5 to 8."""
        return 5 + self.seed % 31 / 10

    def frame(self, t: float, size: tuple[int, int] = SIZE) -> Picture:
        """(height, width, 3) uint8 RGB at t seconds."""
        look = LOOKS[self.world]
        picture = ground_of(self.world, self.ground).copy()
        rng = np.random.default_rng(self.seed)
        for group in self.groups:
            sprite = sprite_of(self.world, group)
            speed, phase = rng.uniform(0.6, 1.4), rng.uniform(0, 2 * math.pi)
            shift = rng.integers(-5, 6, size=2)
            for i, (x, y) in enumerate(spots(group)):
                x += shift[0] + 5 * math.sin(speed * t + phase)
                y += shift[1] + 4 * math.cos(1.7 * speed * t + phase + 2 * i)
                picture.paste(sprite, (round(x - sprite.width / 2), round(y - sprite.height / 2)), sprite)
        pixels = look(np.asarray(picture, dtype=np.float32), self.seed, t)
        if size != SIZE:
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        return pixels


def scenes(world: str, count: int, seed: int) -> list[Scene]:
    """`count` scenes, all of them told apart by their captions; the same for the same seed."""
    rng = np.random.default_rng([seed, WORLDS.index(world)])
    found: dict[tuple[object, ...], Scene] = {}
    while len(found) < count:
        sides = SIDES[rng.integers(2)]
        groups = tuple(
            Group(
                str(rng.choice(SHAPES)),
                str(rng.choice(list(COLOURS))),
                str(rng.choice(TEXTURES)),
                str(rng.choice(SIZES)),
                int(rng.integers(1, 4)),
                place,
            )
            for place in sides
        )
        ground = str(rng.choice(GROUNDS))
        key = (ground, *((g.shape, g.colour, g.place) for g in groups))
        if key not in found:
            found[key] = Scene(world, groups, ground, int(rng.integers(2**31)))
    return list(found.values())


def write_clip(scene: Scene, path: Path) -> None:
    """The scene as an H.264 MP4 file; complete or not there."""
    aside = path.with_suffix(".part")
    with av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "20"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(round(scene.duration * FPS)):
            frame = av.VideoFrame.from_ndarray(scene.frame(i / FPS), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(aside, path)


def write_world(folder: Path, world: str, count: int, seed: int, on_clip: Callable[[int], None] | None = None) -> Path:
    """Clips `<world>-0001.mp4` … in `folder` and a `captions.jsonl` beside them, whose path is returned.

    Clips that are there already are not written again; `on_clip(done)` is called after each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = scenes(world, count, seed)
    paths = [folder / f"{world}-{i:04d}.mp4" for i in range(1, count + 1)]
    captions = folder / "captions.jsonl"
    lines = (
        json.dumps({"file": path.name, "captions": list(scene.captions)}) + "\n"
        for path, scene in zip(paths, drawn, strict=True)
    )
    captions.write_text("".join(lines))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_write_missing, drawn, paths, chunksize=4), start=1):
            if on_clip is not None:
                on_clip(done)
    return captions


def _write_missing(scene: Scene, path: Path) -> None:
    if not path.exists():
        write_clip(scene, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write clips of a demo world.")
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_world(arguments.out, arguments.world, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
