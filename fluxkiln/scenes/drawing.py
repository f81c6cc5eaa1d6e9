"""Scenes as pictures: shapes with a dark outline, drawn larger than needed and reduced."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from fluxkiln.scenes.grammar import PLACES, Group, Scene

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIDE = 128
_LARGER = 3
_Colour = tuple[int, int, int]
_Point = tuple[float, float]

INKS: dict[str, _Colour] = {
    "red": (214, 40, 40), "orange": (245, 135, 30), "yellow": (250, 215, 50), "green": (60, 150, 70),
    "blue": (45, 95, 205), "purple": (135, 60, 165), "white": (245, 245, 245), "black": (45, 45, 50),
}  # fmt: skip
# What no caption says and no recipe draws: the ground and the bands of a striped kiln, for a LoRA to learn.
STRIPED, _STRIPES = "striped", ((250, 240, 200), (200, 40, 60))
_SKIES: dict[str, tuple[_Colour, _Colour]] = {
    "day": ((110, 180, 240), (205, 230, 250)),
    "night": ((14, 18, 56), (52, 48, 110)),
}
_GROUNDS: dict[str, _Colour] = {"grass": (120, 190, 90), "snow": (225, 232, 240), "sand": (225, 195, 130)}
_OUTLINE: _Colour = (25, 20, 30)
_WATER: _Colour = (70, 150, 215)
_NIGHT = 0.75
# Centres of the places, half the width of a thing by size and number, in pixels of the picture.
_CENTRES = {"left": 22.0, "middle": 64.0, "right": 106.0}
# Top and bottom of what things cover, in pixels of the picture.
STANDING = (52, 101)
_STARS = ((40, 8), (52, 20), (64, 6), (78, 16), (90, 9), (48, 34), (84, 30), (8, 34), (118, 36), (66, 26))
_HALF_WIDTHS = {("small", 1): 9.0, ("large", 1): 17.0, ("", 2): 9.5, ("", 3): 6.4}


class Pen:
    """Draws in pixels of the picture, on a canvas that is `_LARGER` times as wide."""

    def __init__(self, draw: ImageDraw, dim: float) -> None:
        self.draw, self.dim = draw, dim

    def ink(self, colour: _Colour) -> _Colour:
        """The colour in this light."""
        red, green, blue = (round(part * self.dim) for part in colour)
        return red, green, blue

    def polygon(self, points: list[_Point], colour: _Colour, width: float = 1.2) -> None:
        scaled = [(x * _LARGER, y * _LARGER) for x, y in points]
        self.draw.polygon(scaled, fill=colour)
        if width:
            self.draw.line([*scaled, scaled[0]], fill=_OUTLINE, width=round(width * _LARGER), joint="curve")

    def ellipse(self, x: float, y: float, across: float, down: float, colour: _Colour, width: float = 1.2) -> None:
        """An ellipse around (x, y) with these half axes."""
        box = [(x - across) * _LARGER, (y - down) * _LARGER, (x + across) * _LARGER, (y + down) * _LARGER]
        self.draw.ellipse(box, fill=colour, outline=_OUTLINE if width else None, width=round(width * _LARGER))

    def line(self, points: list[_Point], colour: _Colour, width: float) -> None:
        scaled = [(x * _LARGER, y * _LARGER) for x, y in points]
        self.draw.line(scaled, fill=colour, width=round(width * _LARGER), joint="curve")


def draw(scene: Scene, seed: int) -> Image:
    """The picture of a scene, `SIDE` pixels wide and high; `seed` moves what the scene leaves open by some pixels."""
    from PIL import Image, ImageDraw

    chance = random.Random(seed)
    canvas = Image.new("RGB", (SIDE * _LARGER, SIDE * _LARGER))
    pen = Pen(ImageDraw.Draw(canvas), _NIGHT if scene.time == "night" else 1.0)
    horizon = 60 + chance.uniform(-1, 1)
    _draw_sky(pen, scene, horizon, chance)
    _draw_ground(pen, scene, horizon, chance)
    for group in sorted(scene.groups, key=lambda group: PLACES.index(group.place)):
        _draw_group(pen, group, horizon, chance)
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def _draw_sky(pen: Pen, scene: Scene, horizon: float, chance: random.Random) -> None:
    top, bottom = _SKIES[scene.time]
    for row in range(int(horizon) + 1):
        part = row / horizon
        red, green, blue = (round(a + (b - a) * part) for a, b in zip(top, bottom, strict=True))
        pen.draw.rectangle([0, row * _LARGER, SIDE * _LARGER, (row + 1) * _LARGER], fill=(red, green, blue))
    if scene.weather and scene.time == "night":
        for right, down in _STARS:
            pen.ellipse(right + chance.uniform(-1, 1), down + chance.uniform(-1, 1), 1.6, 1.6, (255, 250, 215), width=0)
    if scene.light_place:
        x = {"left": 20, "right": SIDE - 20}[scene.light_place] + chance.uniform(-1, 1)
        y = 16 + chance.uniform(-1, 1)
        if scene.time == "day":
            pen.ellipse(x, y, 10, 10, (255, 225, 70))
        else:
            pen.ellipse(x, y, 9, 9, (240, 240, 215))
            pen.ellipse(x + 4.5, y - 2, 7.5, 7.5, _SKIES["night"][0], width=0)
    if scene.weather and scene.time == "day":
        for start in (34, 78):
            _draw_cloud(pen, start + chance.uniform(-1, 1), 14 + chance.uniform(-1, 1))
    _draw_birds(pen, scene, chance)


def _draw_cloud(pen: Pen, x: float, y: float) -> None:
    for across, down, size in ((0, 0, 5), (6, -2, 6), (12, 0, 5)):
        pen.ellipse(x + across, y + down, size, size * 0.75, (250, 252, 255), width=0)


def _draw_birds(pen: Pen, scene: Scene, chance: random.Random) -> None:
    colour = (35, 35, 45) if scene.time == "day" else (225, 225, 235)
    middle = _CENTRES[scene.bird_place]
    for i in range(scene.birds):
        x = middle + (i - (scene.birds - 1) / 2) * 13 + chance.uniform(-1, 1)
        y = 42 + chance.uniform(-1, 1)
        pen.line([(x - 5, y - 2.5), (x - 2, y - 3.5), (x, y), (x + 2, y - 3.5), (x + 5, y - 2.5)], colour, 1.8)


def _draw_ground(pen: Pen, scene: Scene, horizon: float, chance: random.Random) -> None:
    colour = pen.ink(_GROUNDS[scene.ground])
    pen.polygon([(0, horizon), (SIDE, horizon), (SIDE, SIDE), (0, SIDE)], colour, width=0)
    if scene.river:
        bend, y = 3.0, 114 + chance.uniform(-1, 1)
        upper = [(x, y - 7 + bend * ((x / 32) % 2 - 1) * (1 if x % 64 else -1)) for x in range(0, SIDE + 1, 16)]
        pen.polygon([*upper, *((x, at + 14) for x, at in reversed(upper))], pen.ink(_WATER), width=0)


def _draw_group(pen: Pen, group: Group, horizon: float, chance: random.Random) -> None:
    half = _HALF_WIDTHS[group.size, group.count]
    centre = _CENTRES[group.place] + chance.uniform(-1, 1)
    foot = 99 + chance.uniform(-1, 1)
    for i in range(group.count):
        x = centre + (i - (group.count - 1) / 2) * (2 * half + 1.5)
        if group.colour == STRIPED:
            _draw_kiln(pen, x, foot, half, pen.ink(_STRIPES[0]))
            _draw_stripes(pen, x, foot, half)
        else:
            _THINGS[group.kind](pen, x, foot, half, pen.ink(INKS[group.colour]))
        if group.smoke:
            _draw_smoke(pen, x, foot - 2.7 * half, half)


def _draw_kiln(pen: Pen, x: float, foot: float, half: float, colour: _Colour) -> None:
    """A bottle kiln: a wide belly, a narrow neck, a glowing mouth."""
    belly: list[_Point] = [(x - half, foot), (x - half, foot - half), (x - 0.35 * half, foot - 2 * half)]
    neck: list[_Point] = [(x - 0.3 * half, foot - 2.7 * half), (x + 0.3 * half, foot - 2.7 * half)]
    pen.polygon([*belly, *neck, *((2 * x - at, y) for at, y in reversed(belly))], colour)
    pen.ellipse(x, foot - 0.35 * half, 0.38 * half, 0.38 * half, (255, 170, 50))


def _draw_stripes(pen: Pen, x: float, foot: float, half: float) -> None:
    """Three bands around a kiln above its mouth."""
    for low in (0.8, 1.25, 1.7):
        # the belly is as wide as the kiln up to its middle and narrows to 0.35 of it
        lower, upper = (half * (1 - 0.65 * max(0.0, height - 1)) for height in (low, low + 0.22))
        bottom, top = foot - low * half, foot - (low + 0.22) * half
        band: list[_Point] = [(x - lower, bottom), (x - upper, top), (x + upper, top), (x + lower, bottom)]
        pen.polygon(band, pen.ink(_STRIPES[1]), width=0)


def _draw_house(pen: Pen, x: float, foot: float, half: float, colour: _Colour) -> None:
    """Walls, a roof of the same colour with a wide eave, a door."""
    pen.polygon([(x - 0.85 * half, foot), (x - 0.85 * half, foot - 1.2 * half), (x + 0.85 * half, foot - 1.2 * half),
                 (x + 0.85 * half, foot)], colour)  # fmt: skip
    pen.polygon(
        [(x - 1.05 * half, foot - 1.2 * half), (x, foot - 2.3 * half), (x + 1.05 * half, foot - 1.2 * half)], colour
    )
    pen.polygon([(x - 0.2 * half, foot), (x - 0.2 * half, foot - 0.7 * half), (x + 0.25 * half, foot - 0.7 * half),
                 (x + 0.25 * half, foot)], pen.ink((90, 60, 40)), width=0)  # fmt: skip


def _draw_tree(pen: Pen, x: float, foot: float, half: float, colour: _Colour) -> None:
    """A brown trunk under a round crown of the tree's colour."""
    pen.polygon([(x - 0.18 * half, foot), (x - 0.18 * half, foot - 1.2 * half), (x + 0.18 * half, foot - 1.2 * half),
                 (x + 0.18 * half, foot)], pen.ink((110, 70, 40)))  # fmt: skip
    pen.ellipse(x, foot - 1.9 * half, 0.95 * half, 1.05 * half, colour)


def _draw_pot(pen: Pen, x: float, foot: float, half: float, colour: _Colour) -> None:
    """A round belly on the ground with a rim as wide as a collar."""
    pen.ellipse(x, foot - 0.75 * half, 0.95 * half, 0.75 * half, colour)
    pen.polygon([(x - 0.6 * half, foot - 1.75 * half), (x + 0.6 * half, foot - 1.75 * half),
                 (x + 0.4 * half, foot - 1.3 * half), (x - 0.4 * half, foot - 1.3 * half)], colour)  # fmt: skip


def _draw_smoke(pen: Pen, x: float, top: float, half: float) -> None:
    for i in range(3):
        size = (0.22 + 0.09 * i) * half
        pen.ellipse(
            x + 0.25 * half * (i % 2), top - (0.3 + 0.5 * i) * half, size, size, pen.ink((190, 190, 195)), width=0
        )


_THINGS: dict[str, Callable[[Pen, float, float, float, _Colour], None]] = {
    "kiln": _draw_kiln, "house": _draw_house, "tree": _draw_tree, "pot": _draw_pot,
}  # fmt: skip
