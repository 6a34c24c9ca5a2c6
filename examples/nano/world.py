"""The drawn world of the nano model: scenes with 1 to 3 objects, and questions about them.

A scene is a square picture with a dark ground, divided in a 2 x 2 grid. Each object has one of
five shapes and one of six colours and lies, jittered, in a cell of its own. Everything follows
from a seed: the same seed draws the same picture and asks the same questions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64
GRID = 2
MAX_OBJECTS = 3
SUPERSAMPLING = 2
NOISE = 6.0

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (45, 170, 60),
    "blue": (55, 85, 225),
    "yellow": (232, 212, 50),
    "purple": (160, 60, 190),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = ("zero", "one", "two", "three")
KINDS = ("count", "color", "shape", "exist", "where", "what", "describe")

COLOR_NAMES = tuple(COLORS)


@dataclass(frozen=True)
class Item:
    """One drawn object; centre and radius in pixels of the final picture."""

    shape: str
    color: str
    cell: int
    center: tuple[float, float]
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3], and what is on it in reading order."""

    pixels: np.ndarray
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Question:
    """A question with its one right answer."""

    kind: str
    question: str
    answer: str


Fill = tuple[int, int, int]


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        reach = r * (1.15 if corner % 2 == 0 else 0.45)
        angle = corner * math.pi / 5
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return points


def _draw_cross(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Fill) -> None:
    arm = r * 0.36
    draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)


_DRAW: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float, Fill], None]] = {
    "circle": lambda d, x, y, r, f: d.ellipse((x - r, y - r, x + r, y + r), fill=f),
    "square": lambda d, x, y, r, f: d.rectangle(
        (x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=f
    ),
    "triangle": lambda d, x, y, r, f: d.polygon(
        [(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=f
    ),
    "star": lambda d, x, y, r, f: d.polygon(_star(x, y, r), fill=f),
    "cross": _draw_cross,
}


def _jitter(rng: random.Random, color: str) -> Fill:
    red, green, blue = (
        max(0, min(255, value + rng.randint(-18, 18))) for value in COLORS[color]
    )
    return red, green, blue


def draw_scene(rng: random.Random, noise: float = NOISE) -> Scene:
    """Draw a random scene; every random choice comes from ``rng``."""
    side = IMAGE_SIZE * SUPERSAMPLING
    ground = (rng.randint(0, 70), rng.randint(0, 70), rng.randint(0, 70))
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    cells = sorted(rng.sample(range(GRID * GRID), rng.randint(1, MAX_OBJECTS)))
    pitch = side / GRID
    items = []
    for cell in cells:
        shape, color = rng.choice(SHAPES), rng.choice(COLOR_NAMES)
        fill = _jitter(rng, color)
        radius = pitch * rng.uniform(0.29, 0.42)
        slack = pitch * 0.08
        x = (cell % GRID + 0.5) * pitch + rng.uniform(-slack, slack)
        y = (cell // GRID + 0.5) * pitch + rng.uniform(-slack, slack)
        _DRAW[shape](draw, x, y, radius, fill)
        center = (x / SUPERSAMPLING, y / SUPERSAMPLING)
        items.append(Item(shape, color, cell, center, radius / SUPERSAMPLING))
    small = np.asarray(
        image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), np.float32
    )
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, noise, small.shape)
    pixels = np.clip(small + grain, 0, 255).astype(np.uint8)
    return Scene(pixels, tuple(items))


def _count(rng: random.Random, items: tuple[Item, ...], item: Item) -> Question:
    return Question("count", "how many objects are there?", NUMBERS[len(items)])


def _color(rng: random.Random, items: tuple[Item, ...], item: Item) -> Question | None:
    if sum(other.shape == item.shape for other in items) > 1:
        return None
    return Question("color", f"what color is the {item.shape}?", item.color)


def _shape(rng: random.Random, items: tuple[Item, ...], item: Item) -> Question | None:
    if sum(other.color == item.color for other in items) > 1:
        return None
    return Question("shape", f"what shape is the {item.color} object?", f"a {item.shape}")


def _exist(rng: random.Random, items: tuple[Item, ...], item: Item) -> Question | None:
    if rng.random() < 0.5:
        return Question("exist", f"is there a {item.name}?", "yes")
    color, shape = item.color, item.shape
    if rng.random() < 0.5:
        shape = rng.choice(SHAPES)
    else:
        color = rng.choice(COLOR_NAMES)
    if any((other.color, other.shape) == (color, shape) for other in items):
        return None
    return Question("exist", f"is there a {color} {shape}?", "no")


def _where(rng: random.Random, items: tuple[Item, ...], item: Item) -> Question | None:
    if sum(other.name == item.name for other in items) > 1:
        return None
    return Question("where", f"where is the {item.name}?", f"at the {PLACES[item.cell]}")


def _what(rng: random.Random, items: tuple[Item, ...], item: Item) -> Question:
    cell = item.cell if rng.random() < 0.75 else rng.randrange(GRID * GRID)
    found = [other for other in items if other.cell == cell]
    answer = f"a {found[0].name}" if found else "nothing"
    return Question("what", f"what is at the {PLACES[cell]}?", answer)


def describe(items: tuple[Item, ...]) -> Question:
    """The whole scene in reading order."""
    parts = [f"a {item.name} at the {PLACES[item.cell]}" for item in items]
    return Question("describe", "describe the picture.", ", ".join(parts))


def _describe(rng: random.Random, items: tuple[Item, ...], item: Item) -> Question:
    return describe(items)


_ASK: dict[str, Callable[[random.Random, tuple[Item, ...], Item], Question | None]] = {
    "count": _count,
    "color": _color,
    "shape": _shape,
    "exist": _exist,
    "where": _where,
    "what": _what,
    "describe": _describe,
}


_MUST_BE_UNIQUE: dict[str, Callable[[Item], str]] = {
    "color": lambda item: item.shape,
    "shape": lambda item: item.color,
    "where": lambda item: item.name,
}
"""What names the object asked for, in the kinds that ask for one; no other may share it."""


def allows(items: tuple[Item, ...], kind: str) -> bool:
    """Whether a question of this kind has one right answer for some object of the scene."""
    name_of = _MUST_BE_UNIQUE.get(kind)
    if name_of is None:
        return True
    names = [name_of(item) for item in items]
    return any(names.count(name) == 1 for name in names)


def ask(rng: random.Random, items: tuple[Item, ...], kinds: tuple[str, ...]) -> Question:
    """One question of a random kind among ``kinds``, of which the scene must allow one."""
    while True:
        question = _ASK[rng.choice(kinds)](rng, items, rng.choice(items))
        if question is not None:
            return question
