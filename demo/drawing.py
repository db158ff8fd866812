"""How a scene of a demo world looks: objects, grounds, and the camera or film of each world."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Picture = NDArray[np.uint8]
Floats = NDArray[np.floating[Any]]
SIZE = (256, 192)  # width and height in pixels; the middle square holds every object
FPS = 10
SHAPES = ("ball", "box", "pyramid", "star", "ring", "heart", "cross", "diamond")
COLOURS = {
    "red": (214, 40, 40), "orange": (245, 140, 30), "yellow": (250, 222, 60), "green": (40, 160, 70),
    "blue": (45, 90, 215), "purple": (135, 60, 180), "white": (246, 246, 246), "black": (35, 35, 40),
}  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "chequered")
SIZES = ("small", "large")
GROUNDS = ("meadow", "beach", "snow", "sea", "wall", "desert")
SIDES = (("left", "right"), ("top", "bottom"))
CENTRES = {"left": (78, 96), "right": (178, 96), "top": (128, 52), "bottom": (128, 142)}


@dataclass(frozen=True, slots=True)
class Group:
    """One to three equal objects at one place."""

    shape: str
    colour: str
    texture: str
    size: str
    count: int
    place: str


def spots(group: Group) -> list[tuple[float, float]]:
    x, y = CENTRES[group.place]
    step = 0.56 * _width(group)
    if group.count == 1:
        return [(x, y)]
    if group.count == 2:
        return [(x, y - step), (x, y + step)] if group.place in ("left", "right") else [(x - step, y), (x + step, y)]
    if group.place in ("left", "right"):
        return [(x - 0.75 * step, y - step), (x + 0.75 * step, y), (x - 0.75 * step, y + step)]
    return [(x - 2 * step, y), (x, y), (x + 2 * step, y)]


def _width(group: Group) -> int:
    """Pixels of one object."""
    return {"small": (42, 34, 30), "large": (78, 60, 50)}[group.size][group.count - 1]


def _mask(shape: str, width: int) -> Image.Image:
    """(width, width) antialiased silhouette."""
    n = 4 * width
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(n * x, n * y) for x, y in points], fill=255)

    if shape == "ball":
        draw.ellipse((0.03 * n, 0.03 * n, 0.97 * n, 0.97 * n), fill=255)
    elif shape == "box":
        draw.rounded_rectangle((0.08 * n, 0.08 * n, 0.92 * n, 0.92 * n), 0.06 * n, fill=255)
    elif shape == "pyramid":
        polygon([(0.5, 0.04), (0.98, 0.94), (0.02, 0.94)])
    elif shape == "star":
        turns = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
        radii = islice(cycle((0.5, 0.2)), 10)
        polygon([(0.5 + r * math.cos(a), 0.52 + r * math.sin(a)) for a, r in zip(turns, radii, strict=True)])
    elif shape == "ring":
        draw.ellipse((0.03 * n, 0.03 * n, 0.97 * n, 0.97 * n), fill=255)
        draw.ellipse((0.3 * n, 0.3 * n, 0.7 * n, 0.7 * n), fill=0)
    elif shape == "heart":
        turns = [2 * math.pi * i / 80 for i in range(80)]
        xs = [16 * math.sin(a) ** 3 for a in turns]
        ys = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in turns]
        polygon([(0.5 + x / 34, 0.46 - y / 34) for x, y in zip(xs, ys, strict=True)])
    elif shape == "cross":
        draw.rectangle((0.33 * n, 0.03 * n, 0.67 * n, 0.97 * n), fill=255)
        draw.rectangle((0.03 * n, 0.33 * n, 0.97 * n, 0.67 * n), fill=255)
    else:
        polygon([(0.5, 0.01), (0.88, 0.5), (0.5, 0.99), (0.12, 0.5)])
    return mask.resize((width, width), Image.Resampling.LANCZOS)


def _pattern(texture: str, width: int) -> Floats:
    """(width, width) from 0 to 1: how much of the second colour shows."""
    y, x = np.mgrid[0:width, 0:width] / width
    pattern = np.zeros((width, width))
    if texture == "striped":
        pattern = np.sin(2 * math.pi * 3 * (x + y)) > 0
    elif texture == "dotted":
        pattern = (x * 4 % 1 - 0.5) ** 2 + (y * 4 % 1 - 0.5) ** 2 < 0.09
    elif texture == "chequered":
        pattern = (np.floor(x * 4) + np.floor(y * 4)) % 2
    return np.asarray(pattern, np.float32)


@lru_cache(maxsize=512)
def sprite_of(world: str, group: Group) -> Image.Image:
    """One object of a group, RGBA, with a soft shadow or, on a plan, as an outline with its hatching."""
    width = _width(group)
    mask = _mask(group.shape, width)
    colour = np.array(COLOURS[group.colour], np.float32)
    pattern = _pattern(group.texture, width)[..., None]
    alpha = np.asarray(mask, np.float32) / 255
    if world == "blueprint":
        inner = np.asarray(mask.filter(ImageFilter.MinFilter(5)), np.float32) / 255
        ink = 255 - 0.8 * (255 - np.roll(255 - colour, 1))  # tints of the opposite hue
        shown = np.clip(alpha - inner + 0.85 * inner * pattern[..., 0] + 0.16 * inner, 0, 1)
        return _rgba(np.broadcast_to(ink, (width, width, 3)), shown)
    second = np.clip(colour * 0.35, 0, 255) if colour.mean() > 110 else 255 - 0.45 * (255 - colour)
    y, x = np.mgrid[0:width, 0:width] / width
    light = (1.16 - 0.45 * np.hypot(x - 0.35, y - 0.3))[..., None]
    body = _rgba((colour * (1 - pattern) + second * pattern) * light, alpha)
    margin = 6
    sprite = Image.new("RGBA", (width + 2 * margin, width + 2 * margin))
    shadow = Image.new("L", sprite.size)
    shadow.paste(mask.point(lambda v: v * 0.45), (margin + 3, margin + 4))
    sprite.putalpha(shadow.filter(ImageFilter.GaussianBlur(2.5)))
    sprite.alpha_composite(body, (margin, margin))
    return sprite


def _rgba(colour: Floats, alpha: Floats) -> Image.Image:
    return Image.fromarray(np.dstack([np.clip(colour, 0, 255), 255 * alpha]).astype(np.uint8), "RGBA")


@lru_cache(maxsize=32)
def ground_of(world: str, ground: str) -> Image.Image:
    return _plan(ground) if world == "blueprint" else _landscape(ground)


def _landscape(ground: str) -> Image.Image:
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    rng = np.random.default_rng(GROUNDS.index(ground))
    grain = rng.normal(0, 1, (height, width)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(grain).resize((width // 16, height // 16)).resize(SIZE, Image.Resampling.BICUBIC))
    sky, near, far, horizon = {
        "meadow": ((150, 205, 245), (70, 140, 55), (150, 200, 100), 0.35),
        "beach": ((165, 220, 240), (238, 214, 160), (205, 178, 120), 0.3),
        "snow": ((190, 205, 225), (242, 246, 252), (214, 224, 238), 0.35),
        "sea": ((200, 230, 250), (20, 95, 140), (80, 165, 195), 0.25),
        "wall": ((150, 80, 62), (150, 80, 62), (150, 80, 62), 0.0),
        "desert": ((250, 170, 110), (190, 120, 70), (225, 160, 100), 0.4),
    }[ground]
    depth = np.clip((y / height - horizon) / (1 - horizon), 0, 1)[..., None]
    earth = np.array(far, np.float32) * (1 - depth) + np.array(near, np.float32) * depth
    edge = horizon * height + (6 * np.sin(x / 37) if ground in ("meadow", "snow", "desert") else 0 * x)
    above = np.array(sky, np.float32) + (40 * (y / height))[..., None]
    picture = np.where((y < edge)[..., None], above, earth)
    if ground == "wall":
        row = np.floor(y / 12)
        along = x + 14 * (row % 2)
        mortar = (y % 12 < 2) | (along % 28 < 2)
        shade = 12 * np.sin(5 * row + 3 * np.floor(along / 28))
        picture = np.where(mortar[..., None], 190.0, picture + shade[..., None])
    if ground == "sea":
        picture += (14 * np.sin(y / 3 + 3 * np.sin(x / 19)) * depth[..., 0])[..., None]
    picture = picture + (5 * smooth + 3 * grain)[..., None]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _plan(ground: str) -> Image.Image:
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cx, cy = x - width / 2, y - height / 2
    radius, angle = np.hypot(cx, cy), np.arctan2(cy, cx)
    lines = {
        "meadow": (x % 16 < 1.2) | (y % 16 < 1.2),
        "beach": y % 12 < 1.4,
        "snow": ((x % 12 - 6) ** 2 + (y % 12 - 6) ** 2) < 4,
        "sea": np.zeros_like(x, bool),
        "wall": ((0.58 * x + y) % 18 < 1.3) | ((0.58 * x - y) % 18 < 1.3),
        "desert": (radius % 20 < 1.4) | (np.abs((angle * 6 / math.pi + 0.5) % 1 - 0.5) * radius * math.pi / 6 < 0.8),
    }[ground]
    border = (np.minimum.reduce([x, y, width - 1 - x, height - 1 - y]) // 2) == 3
    paper = np.broadcast_to(np.array((22, 62, 130), np.float32), (height, width, 3))
    picture = paper + 55 * lines[..., None] + 150 * border[..., None]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _plainly(pixels: Floats, seed: int, t: float) -> Picture:
    return pixels.astype(np.uint8)


def _night_camera(pixels: Floats, seed: int, t: float) -> Picture:
    """Inverted and permuted false colours, dimmed towards the corners, with scan lines, noise and a running time bar."""
    width, height = SIZE
    false = 255 - pixels[..., [1, 2, 0]]
    y, x = np.mgrid[0:height, 0:width]
    vignette = 1.08 - 0.55 * (((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2) * 2
    noise = np.random.default_rng([seed, int(t * FPS)]).normal(0, 9, (height, width, 1))
    shown = (0.78 * false + (0, 26, 8)) * (vignette * np.where(y % 3 == 0, 0.8, 1.0))[..., None] + noise
    shown[height - 6 : height - 3, 8 : 8 + int(24 * t) % (width - 16)] = (120, 255, 140)
    return np.asarray(np.clip(shown, 0, 255), np.uint8)


def _old_film(pixels: Floats, seed: int, t: float) -> Picture:
    """Faded film stock: soft, pale and of shifted hues, with grain, dust, scratches, flicker and dark corners."""
    width, height = SIZE
    rng = np.random.default_rng([seed, int(t * FPS)])
    soft = Image.fromarray(pixels.astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.3))
    shown = np.asarray(soft, np.float32) @ _FADED
    y, x = np.mgrid[0:height, 0:width]
    vignette = 1.06 - 0.9 * (((x - width / 2) / width) ** 2 + ((y - height / 2) / height) ** 2)
    shown = (_FOG + 0.62 * shown) * (vignette * rng.uniform(0.9, 1.04))[..., None]
    grain = Image.fromarray(rng.normal(0, 13, (height // 2, width // 2)).astype(np.float32))
    shown += np.asarray(grain.resize(SIZE, Image.Resampling.BILINEAR))[..., None]
    for column in np.random.default_rng([seed, int(t)]).integers(0, width, 2):  # a scratch stays for a second
        shown[:, (column + rng.integers(-1, 2)) % width] += rng.choice((-40, 55))
    for _ in range(rng.integers(3)):
        cx, cy, radius = rng.integers(width), rng.integers(height), rng.uniform(1, 3)
        shown[np.hypot(x - cx, y - cy) < radius] = 215
    return np.asarray(np.clip(shown, 0, 255), np.uint8)


def _fading(saturation: float, turn: float) -> Floats:
    """(3, 3) for pixels @ matrix: the hue turned by `turn` degrees about the grey axis, the distance from it scaled."""
    grey = np.full((3, 3), 1 / 3)
    across = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]) / math.sqrt(3)
    angle = math.radians(turn)
    turned = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * across
    return np.asarray(grey + saturation * turned, np.float32)


_FADED = _fading(0.6, 10)
_FOG = np.array((74, 58, 40), np.float32)  # the stock has yellowed

LOOKS: dict[str, Callable[[Floats, int, float], Picture]] = {
    "daylight": _plainly,
    "nightwatch": _night_camera,
    "blueprint": _plainly,
    "archive": _old_film,
}
