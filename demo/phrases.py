"""A visitor's own words: phrases that tell only a part of a daylight scene, with synonyms and in other orders.

The built-in backbone is trained on them beside whole captions, so that "red hearts" finds every scene that has some. None of
these words belongs to another world's language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.drawing import COLOURS, GROUNDS, SHAPES, SIDES, SIZES, TEXTURES
from demo.worlds import Scene

THINGS: dict[str, tuple[str, ...]] = {
    "count": ("1", "2", "3"),
    "size": SIZES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(side for sides in SIDES for side in sides),
}
"""What a phrase may tell of a group of objects, with the values there are."""
ANY = -1
OWN_NAME = 0.6  # how often a thing is called by the first of its words

WORDS: dict[str, tuple[str, ...]] = {
    "1": ("a", "one"), "2": ("two",), "3": ("three",),
    "small": ("small", "little", "tiny"), "large": ("large", "big", "huge"),
    "plain": ("plain", "solid"), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted"),
    "chequered": ("chequered", "checkered", "checked"),
    "red": ("red", "scarlet"), "purple": ("purple", "violet"),
    "ball": ("ball", "sphere"), "box": ("box", "cube"), "pyramid": ("pyramid", "triangle"), "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "left": ("on the left", "at the left", "to the left"), "right": ("on the right", "at the right", "to the right"),
    "top": ("at the top", "on top", "high up"), "bottom": ("at the bottom", "below", "down low"),
    "meadow": ("in a green meadow", "in a meadow", "on grass", "in a field"),
    "beach": ("on a sandy beach", "on a beach", "at the beach", "on the sand"),
    "snow": ("in the snow", "on snow", "in winter"),
    "sea": ("above the sea", "by the sea", "above water", "above the ocean"),
    "wall": ("before a brick wall", "in front of a brick wall", "before a wall", "against bricks"),
    "desert": ("in a desert at sunset", "in the desert", "in a desert", "at sunset"),
}  # fmt: skip
BEHIND = {
    "striped": ("with stripes",), "dotted": ("with dots", "with spots"), "chequered": ("with checks",)
}  # fmt: skip
NOTHING_NAMED = ("thing", "object", "shape")
OPENINGS = ("", "", "", "", "a video of ", "show me ", "a clip with ", "find ")
JOINS = ("{a} and {b}", "{a} with {b}", "{a}, {b}", "{b} and {a}", "{a} next to {b}")
GROUNDED = ("{x} {ground}", "{x} {ground}", "{ground}, {x}", "{x}, {ground}", "{ground}: {x}")


@dataclass(frozen=True, slots=True)
class Phrase:
    """`text`, and what it asks for: `groups` (2, 6) int8, a row of values' numbers in THINGS for each group of objects, and the
    number of its ground; ANY where it says nothing.
    """

    text: str
    groups: NDArray[np.int8]
    ground: int = ANY


@dataclass(frozen=True, slots=True)
class Facts:
    """What there is in S scenes, as numbers: `groups` (S, 2, 6) int8 and `ground` (S,) int8."""

    groups: NDArray[np.int8]
    ground: NDArray[np.int8]

    @classmethod
    def of(cls, scenes: Sequence[Scene]) -> Facts:
        rows = [
            [[values.index(str(getattr(group, thing))) for thing, values in THINGS.items()] for group in scene.groups]
            for scene in scenes
        ]
        return cls(np.array(rows, np.int8), np.array([GROUNDS.index(scene.ground) for scene in scenes], np.int8))

    def __getitem__(self, chosen: NDArray[np.intp]) -> Facts:
        return Facts(self.groups[chosen], self.ground[chosen])

    def fit(self, phrases: Sequence[Phrase]) -> NDArray[np.bool_]:
        """(P, S): does the scene have what the phrase asks for, each of its groups in another group of the scene."""
        asked = np.stack([phrase.groups for phrase in phrases])[:, None, :, None]  # P, 1, 2, 1, 6
        has = ((asked == self.groups[None, :, None]) | (asked == ANY)).all(-1)  # P, S, asked, there
        ground = np.array([phrase.ground for phrase in phrases], np.int8)[:, None]
        there: NDArray[np.bool_] = has[..., 0, 0] & has[..., 1, 1] | has[..., 0, 1] & has[..., 1, 0]
        there &= (ground == ANY) | (ground == self.ground)
        return there


def draw_phrase(scene: Scene, rng: np.random.Generator, facts: int | None = None) -> Phrase:
    """A phrase that is true of the scene. With `facts`, it tells so many things of one group of objects and the ground;
    else one to four of one group, or one to three of each, and the ground in a third of all.
    """
    groups = np.full((2, len(THINGS)), ANY, np.int8)
    first = int(rng.integers(2))
    names = tuple(THINGS)
    if facts is not None:
        kinds = rng.permutation(len(THINGS) + 1)[:facts].tolist()
        told, grounded = [[names[k] for k in kinds if k < len(THINGS)]], len(THINGS) in kinds
    else:
        sizes = rng.integers(1, 4, size=2) if rng.random() < 0.25 else rng.integers(1, 5, size=1)
        told, grounded = [[names[k] for k in rng.permutation(len(names))[:size]] for size in sizes], rng.random() < 1 / 3
        if not grounded and rng.random() < 0.03:
            told, grounded = [[]], True
    nouns = []
    for row, things in enumerate(told):
        group = scene.groups[(first + row) % 2]
        values = {thing: str(getattr(group, thing)) for thing in things}
        for thing, value in values.items():
            groups[row, names.index(thing)] = THINGS[thing].index(value)
        if values:
            nouns.append(_noun(values, rng))
    text = str(rng.choice(JOINS)).format(a=nouns[0], b=nouns[1]) if len(nouns) == 2 else "".join(nouns)
    if grounded:
        place = _word(scene.ground, rng)
        text = str(rng.choice(GROUNDED)).format(x=text, ground=place) if text else place
    return Phrase(str(rng.choice(OPENINGS)) + text, groups, GROUNDS.index(scene.ground) if grounded else ANY)


def _noun(values: dict[str, str], rng: np.random.Generator) -> str:
    """The things told of one group as a noun with what stands before and behind it."""
    count, place = values.get("count"), values.get("place")
    before, behind = [], []
    for thing in rng.permutation(["texture", "colour"]) if rng.random() < 0.3 else ["texture", "colour"]:
        value = values.get(str(thing))
        if value in BEHIND and rng.random() < 0.25:
            behind.append(str(rng.choice(BEHIND[value])))
        elif value is not None:
            before.append(_word(value, rng))
    if "size" in values:
        before.insert(0, _word(values["size"], rng))
    several = count in ("2", "3") or (count is None and rng.random() < 0.6)
    noun = _word(values["shape"], rng) if "shape" in values else str(rng.choice(NOTHING_NAMED))
    if several:
        noun += "es" if noun[-1] in "sx" else "s"
    if before and "shape" not in values and count is None and rng.random() < 0.2:
        noun = ""  # "red", "red striped"
    elif before and not behind and rng.random() < 0.1:
        noun, before = f"{noun} that {'are' if several else 'is'} {' and '.join(before)}", []
    words = " ".join(word for word in (*before, noun, *behind) if word)
    if count is not None:
        number = _word(count, rng)
        words = f"{'an' if number == 'a' and words[0] in 'aeiou' else number} {words}"
    if place is None:
        return words
    where = _word(place, rng)
    if values.keys() == {"place"} and rng.random() < 0.3:
        return f"something {where}"
    return f"{where}, {words}" if rng.random() < 0.2 else f"{words} {where}"


def _word(value: str, rng: np.random.Generator) -> str:
    words = WORDS.get(value, (value,))
    return words[0] if len(words) == 1 or rng.random() < OWN_NAME else str(rng.choice(words))
