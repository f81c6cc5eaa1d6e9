"""The grammar of scenes: what can stand in a picture, how a caption says it, and which facts a caption states.

A scene is decided by chance, then told by a caption that may leave facts out. A picture of the caption is right when
every fact that the caption states holds in it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

THINGS = ("kiln", "house", "tree", "pot")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
PLACES = ("left", "middle", "right")
SIZES = ("small", "large")
TIMES = ("day", "night")
GROUNDS = ("grass", "snow", "sand")
COUNTS = ("no", "a", "two", "three")
# A caption's longest; each word is one token of T5, and so is the end.
MOST_WORDS = 22
# Of a hundred combinations of things, how many are never trained on.
HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Group:
    """One to three equal things that stand beside one another on the ground; a size ('' for several) of one alone."""

    kind: str
    colour: str
    count: int
    size: str
    place: str
    smoke: bool = False


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; `light_place` is where sun or moon stands, '' where the sky has neither."""

    time: str
    ground: str
    groups: tuple[Group, ...]
    river: bool = False
    light_place: str = ""
    weather: bool = False
    birds: int = 0
    bird_place: str = "middle"

    @property
    def light(self) -> str:
        """What shines at this time: the sun or the moon."""
        return "sun" if self.time == "day" else "moon"

    @property
    def combination(self) -> str:
        """What makes a picture another than those seen: the things, their colours, numbers and places."""
        things = sorted(f"{group.count} {group.colour} {group.kind} {group.place}" for group in self.groups)
        return f"{self.time}; {'; '.join(things)}"

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept for the judge: never drawn for training."""
        return hashlib.sha256(self.combination.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


@dataclass(frozen=True)
class Fact:
    """One statement of a caption: of the things of one kind, or of the whole scene where `kind` is ''.

    `name` is a field of `Group` or `Scene`, or a relation that `holds` knows; `value` what it must be.
    """

    name: str
    value: str | int | bool
    kind: str = ""


@dataclass(frozen=True)
class Prompt:
    """A caption and the facts that it states."""

    text: str
    facts: tuple[Fact, ...]


def holds(fact: Fact, scene: Scene) -> bool:
    """Whether a scene is as the fact says."""
    if not fact.kind:
        if fact.name == "kinds":
            return fact.value == " ".join(sorted(group.kind for group in scene.groups))
        if fact.name == "light":
            return bool(scene.light_place) and scene.light == fact.value
        return bool(getattr(scene, fact.name) == fact.value)
    groups = [group for group in scene.groups if group.kind == fact.kind]
    if not groups:
        return False
    if fact.name == "count":
        return sum(group.count for group in groups) == fact.value
    if fact.name in ("left of", "right of"):
        others = [PLACES.index(group.place) for group in scene.groups if group.kind == fact.value]
        mine = [PLACES.index(group.place) for group in groups]
        return bool(others) and (max(mine) < min(others) if fact.name == "left of" else min(mine) > max(others))
    if fact.name == "birds above":
        return scene.birds > 0 and all(group.place == scene.bird_place for group in groups)
    return all(getattr(group, fact.name) == fact.value for group in groups)


def draw_scene(chance: random.Random) -> Scene:
    """A random scene."""
    time = chance.choice(TIMES)
    groups = tuple(
        _draw_group(chance, kind, place)
        for kind, place in zip(
            chance.sample(THINGS, chance.choice((1, 2, 2))), chance.sample(PLACES, len(PLACES)), strict=False
        )
    )
    return Scene(
        time=time,
        ground=chance.choice(GROUNDS),
        groups=groups,
        river=chance.random() < 0.4,
        light_place=chance.choice(("", "left", "right")),
        weather=chance.random() < 0.4,
        birds=chance.choice((0, 0, 1, 2, 3)),
        bird_place=chance.choice(PLACES),
    )


def _draw_group(chance: random.Random, kind: str, place: str) -> Group:
    count = chance.choice((1, 1, 2, 3))
    return Group(
        kind=kind,
        colour=chance.choice(COLOURS),
        count=count,
        size=chance.choice(SIZES) if count == 1 else "",
        place=place,
        smoke=kind == "kiln" and chance.random() < 0.3,
    )


def scenes(seed: int, held_out: bool = False) -> Iterator[tuple[Scene, Prompt]]:
    """Scenes with a caption each, without end; the same for the same seed. Held-out combinations, or all others."""
    chance = random.Random(seed)
    while True:
        scene = draw_scene(chance)
        prompt = write_caption(scene, chance)
        if scene.held_out == held_out and len(prompt.text.split()) <= MOST_WORDS:
            yield scene, prompt


def write_caption(scene: Scene, chance: random.Random) -> Prompt:
    """A caption of the scene with some of its facts, in one of several word orders.

    The kinds of things and their numbers are always told, so nothing else may stand on the ground.
    """
    facts = [Fact("kinds", " ".join(sorted(group.kind for group in scene.groups)))]
    things = [_describe_group(group, facts, chance) for group in scene.groups]
    text = _arrange(scene, things, facts, chance)
    if scene.river:
        text += chance.choice((" by a river", " near a river", " beside a river", " next to a river"))
        facts.append(Fact("river", True))
    if chance.random() < 0.5:
        text += {"grass": " on grass", "snow": " in the snow", "sand": " on sand"}[scene.ground]
        facts.append(Fact("ground", scene.ground))
    opening = chance.random()
    if opening < 0.2:
        text = f"{chance.choice(('a picture of', 'a painting of', 'a scene with'))} {text}"
    elif opening < 0.3:
        text = f"there {'is' if scene.groups[0].count == 1 else 'are'} {text}"
    sky = _describe_sky(scene, facts, chance)
    time = chance.random()
    if time < 0.55 or not sky:
        facts.append(Fact("time", scene.time))
        when = {"day": ("by day", "on a bright day"), "night": ("at night", "in the dark night")}[scene.time]
        phrase = chance.choice(when)
        text = f"{phrase}, {text}" if time < 0.1 else f"{text} {phrase}"
    if sky:
        text += f" with {sky}"
    return Prompt(text, tuple(facts))


def _describe_group(group: Group, facts: list[Fact], chance: random.Random) -> str:
    words = [chance.choice(("a", "a", "one")) if group.count == 1 else COUNTS[group.count]]
    facts.append(Fact("count", group.count, group.kind))
    if group.size and chance.random() < 0.6:
        words.append(
            {"small": chance.choice(("small", "little")), "large": chance.choice(("large", "big"))}[group.size]
        )
        facts.append(Fact("size", group.size, group.kind))
    if chance.random() < 0.9:
        words.append(group.colour)
        facts.append(Fact("colour", group.colour, group.kind))
    if group.smoke and chance.random() < 0.8:
        words.append("smoking")
        facts.append(Fact("smoke", True, group.kind))
    words.append(group.kind if group.count == 1 else f"{group.kind}s")
    phrase = " ".join(words)
    return phrase.replace("a orange ", "an orange ")


def _arrange(scene: Scene, things: list[str], facts: list[Fact], chance: random.Random) -> str:
    places = [group.place for group in scene.groups]
    way = chance.random()
    if len(things) == 1:
        if way < 0.3:
            return things[0]
        facts.append(Fact("place", places[0], scene.groups[0].kind))
        where = "in the middle" if places[0] == "middle" else f"on the {places[0]}"
        return f"{things[0]} {where}"
    if way < 0.15:
        return f"{things[0]} and {things[1]}"
    if way < 0.35:
        facts += [Fact("place", group.place, group.kind) for group in scene.groups]
        wheres = ["in the middle" if place == "middle" else f"on the {place}" for place in places]
        return f"{things[0]} {wheres[0]} and {things[1]} {wheres[1]}"
    side = "left" if PLACES.index(places[0]) < PLACES.index(places[1]) else "right"
    facts.append(Fact(f"{side} of", scene.groups[1].kind, scene.groups[0].kind))
    return f"{things[0]} {chance.choice(('', 'to the '))}{side} of {things[1]}"


def _describe_sky(scene: Scene, facts: list[Fact], chance: random.Random) -> str:
    said = []
    if scene.light_place and chance.random() < 0.8:
        facts += [Fact("light", scene.light)]
        said.append(f"the {scene.light}")
        if chance.random() < 0.5:
            facts.append(Fact("light_place", scene.light_place))
            said[-1] += f" on the {scene.light_place}"
    if scene.weather and chance.random() < 0.8:
        facts.append(Fact("weather", True))
        said.append("stars" if scene.time == "night" else "clouds")
    if scene.birds and chance.random() < 0.8:
        facts.append(Fact("birds", scene.birds))
        said.append(f"{COUNTS[scene.birds]} {'bird' if scene.birds == 1 else 'birds'}")
        below = [group for group in scene.groups if group.place == scene.bird_place]
        if below and chance.random() < 0.6:
            facts.append(Fact("birds above", True, below[0].kind))
            kind = below[0].kind if below[0].count == 1 else f"{below[0].kind}s"
            said[-1] += f" {chance.choice(('above', 'over'))} the {kind}"
    chance.shuffle(said)
    return " and ".join(said)
