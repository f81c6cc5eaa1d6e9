"""The judge: a small network that reads a picture back into a scene, and what its reading says about a prompt.

It learned from drawings alone, moved, blurred and with noise, so it knows nothing of the models it judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.scenes.drawing import SIDE, draw
from fluxkiln.scenes.grammar import COLOURS, GROUNDS, PLACES, SIZES, THINGS, TIMES, Group, Prompt, Scene, scenes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Generator, Tensor
    from torch.nn import Module

JUDGE_WEIGHTS = Path(__file__).with_name("judge.safetensors")

# What is read: a question and its answers. Of each place on the ground first what stands there.
_ASKED_OF_PLACES: Mapping[str, tuple[Any, ...]] = {
    "kind": ("", *THINGS), "colour": COLOURS, "count": (1, 2, 3), "size": SIZES, "smoke": (False, True),
}  # fmt: skip
_QUESTIONS: Mapping[str, tuple[Any, ...]] = {
    "time": TIMES, "ground": GROUNDS, "river": (False, True), "light_place": ("", "left", "right"),
    "weather": (False, True), "birds": (0, 1, 2, 3), "bird_place": PLACES,
    **{f"{place} {name}": answers for place in PLACES for name, answers in _ASKED_OF_PLACES.items()},
}  # fmt: skip
ANSWERS = sum(len(answers) for answers in _QUESTIONS.values())


def _answers(scene: Scene) -> dict[str, Any]:
    """The answers that a picture of `scene` has; a question without one is left out."""
    found = {name: getattr(scene, name) for name in ("time", "ground", "river", "light_place", "weather", "birds")}
    if scene.birds:
        found["bird_place"] = scene.bird_place
    standing = {group.place: group for group in scene.groups}
    for place in PLACES:
        group = standing.get(place)
        found[f"{place} kind"] = group.kind if group else ""
        if group:
            found |= {f"{place} {name}": getattr(group, name) for name in ("colour", "count", "smoke")}
            if group.size:
                found[f"{place} size"] = group.size
    return found


def _scene(answers: Mapping[str, Any]) -> Scene:
    groups = []
    for place in PLACES:
        kind, colour, count, size, smoke = (answers[f"{place} {name}"] for name in _ASKED_OF_PLACES)
        if kind:
            groups.append(Group(kind, colour, count, size if count == 1 else "", place, smoke))
    rest = {name: answers[name] for name in _QUESTIONS if " " not in name}
    return Scene(groups=tuple(groups), **rest)


def build_network() -> Module:
    """The network, with random weights: [N, 3, 128, 128] in [-1, 1] -> one score for each answer to each question."""
    from torch import nn

    def level(inputs: int, outputs: int) -> list[Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.SiLU()]

    return nn.Sequential(
        nn.Sequential(*level(3, 16)), nn.Sequential(*level(16, 32)), nn.Sequential(*level(32, 64)),
        nn.Sequential(*level(64, 64), nn.Conv2d(64, 32, 1)),
        nn.Sequential(nn.Flatten(), nn.Linear(32 * 8 * 8, 160), nn.SiLU(), nn.Linear(160, ANSWERS)),
    )  # fmt: skip


class Drawings:
    """Drawings with their answers, from which batches are taken."""

    def __init__(self, seed: int, count: int) -> None:
        import torch

        drawn = list(islice(scenes(seed), count))
        pictures = np.stack([np.asarray(draw(scene, i)) for i, (scene, _) in enumerate(drawn)])
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        self.targets = answers_of([scene for scene, _ in drawn])

    def loss(self, network: Module, batch: int, generator: Generator) -> Tensor:
        """Cross-entropy over all questions, on pictures moved by some pixels, blurred or with noise."""
        import torch
        from torch.nn import functional as F

        index = torch.randint(len(self.pictures), (batch,), generator=generator)
        pictures_NCHW = self.pictures[index].float().div(127.5).sub(1)
        move = torch.randint(-3, 4, (2,), generator=generator).tolist()
        pictures_NCHW = torch.roll(pictures_NCHW, move, dims=(2, 3))
        dice = torch.rand(3, generator=generator).tolist()
        if dice[0] < 0.5:
            blurred = F.avg_pool2d(pictures_NCHW, 3, 1, 1, count_include_pad=False)
            pictures_NCHW = pictures_NCHW.lerp(blurred, dice[0] * 2)
        pictures_NCHW = pictures_NCHW * (0.9 + 0.2 * dice[1])
        noise = torch.randn(pictures_NCHW.shape, generator=generator)
        return reading_loss(network(pictures_NCHW + 0.15 * dice[2] * noise), self.targets[index])


def answers_of(scenes: Sequence[Scene]) -> Tensor:
    """The answers [N, questions] that pictures of the scenes have; -100 where there is none."""
    import torch

    found = [_answers(scene) for scene in scenes]
    return torch.tensor(
        [[said.index(one[name]) if name in one else -100 for name, said in _QUESTIONS.items()] for one in found]
    )


def reading_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """The sum over all questions of the cross-entropy of scores [N, answers] with the answers [N, questions]."""
    import torch
    from torch.nn import functional as F

    total = torch.zeros(())
    for part, target in zip(_parts(scores), targets.T, strict=True):
        if (target >= 0).any():
            total = total + F.cross_entropy(part, target)
    return total


def _parts(scores: Tensor) -> Iterator[Tensor]:
    ends = list(accumulate(len(answers) for answers in _QUESTIONS.values()))
    return (scores[:, end - len(answers) : end] for answers, end in zip(_QUESTIONS.values(), ends, strict=True))


@lru_cache(maxsize=1)
def load_judge() -> Module:
    """The trained network that ships with the package."""
    import torch
    from safetensors.torch import load_file

    network = build_network()
    network.load_state_dict({name: tensor.to(torch.float32) for name, tensor in load_file(JUDGE_WEIGHTS).items()})
    return network.eval()


def _as_input(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    import torch
    from PIL import Image

    sized = [
        np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) if len(image) != SIDE else image)
        for image in images
    ]
    return torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def read_scenes(images: Sequence[NDArray[np.uint8]], network: Module | None = None) -> list[Scene]:
    """What stands in pictures, [H, W, 3] each; another size than the drawings' is brought to theirs."""
    import torch

    with torch.no_grad():
        chosen = [part.argmax(dim=1).tolist() for part in _parts((network or load_judge())(_as_input(images)))]
    names = list(_QUESTIONS)
    return [
        _scene({name: _QUESTIONS[name][answer] for name, answer in zip(names, row, strict=True)})
        for row in zip(*chosen, strict=True)
    ]


def distance(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """How differently the judge sees two pictures: the mean square between its unit features over all levels.

    As LPIPS is made (arXiv 1801.03924), with this network's features and equal weights: 0 for equal pictures.
    """
    import torch
    from torch.nn import functional as F

    features, total = _as_input([image, other]), 0.0
    with torch.no_grad():
        for level in list(load_judge().children())[:4]:
            features = level(features)
            unit = F.normalize(features, dim=1)
            total += (unit[0] - unit[1]).square().sum(dim=0).mean().item()
    return total / 4


def drawn(asked: Iterable[tuple[Scene, Prompt]]) -> list[NDArray[np.uint8]]:
    """The drawings of scenes, as the judge's own reference."""
    return [np.asarray(draw(scene, i)) for i, (scene, _) in enumerate(asked)]
