"""One stage of a recipe: steps of AdamW that can be killed at any moment and go on to the same result.

Chance comes from the seed, the stage's name and the number of the step. So a state on disk is weights, moments and that
number: one file, renamed into place.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.errors import FluxkilnError
from fluxkiln.files import write_durably

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module
    from torch.optim import AdamW

# (steps done, steps in all, mean loss of the last steps, seconds a step)
OnSteps = Callable[[int, int, float, float], None]
_SAVE_EVERY_S = 120.0
_SHOW_EVERY = 10


@dataclass(frozen=True)
class Stage:
    """What is trained, for how long and on what.

    Attributes:
        modules: what learns, by name; they hold the result when the stage has run.
        loss: of a step, from the generator that this step's chance comes from.
        warmup: steps of rising learning rate; it falls to nothing along a cosine after them.
        average: decay of the moving average of the weights, which is the result; 0 for the weights themselves.
    """

    name: str
    modules: Mapping[str, Module]
    loss: Callable[[Generator], Tensor]
    steps: int
    learning_rate: float
    seed: int = 0
    warmup: int = 50
    weight_decay: float = 0.0
    average: float = 0.0

    def parameters(self) -> dict[str, Tensor]:
        """All that learns, by the module's name and its own."""
        return {
            f"{name}.{own}": parameter
            for name, module in self.modules.items()
            for own, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * step / self.steps)) / 2)

    def chance(self, step: int) -> Generator:
        """Where a step's random numbers come from."""
        import torch

        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{self.name}/{step}".encode()))


def run_stage(stage: Stage, folder: Path, on_step: OnSteps | None = None) -> None:
    """Train to the end, from the state in `folder` where there is one; the modules then hold the result.

    Raises:
        FluxkilnError: a loss that is no number; the last good state stays.
    """
    import torch

    file, parameters = folder / f"{stage.name}.safetensors", stage.parameters()
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay, fused=True
    )
    averages = {name: parameter.detach().clone() for name, parameter in parameters.items()} if stage.average else {}
    step = _load(file, stage, parameters, averages, optimizer) if file.is_file() else 0
    saved = began = time.perf_counter()
    losses: list[float] = []
    first = step
    while step < stage.steps:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        loss = stage.loss(stage.chance(step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        if not math.isfinite(norm.item()):
            raise FluxkilnError(
                f"{stage.name}: the loss of step {step} is {loss.item()}, not a number; lower the learning rate, the "
                f"state before it is kept"
            )
        optimizer.step()
        step += 1
        # A young average would remember the beginning.
        decay = min(stage.average, step / (step + 10))
        for name, average in averages.items():
            average.lerp_(parameters[name].detach(), 1 - decay)
        losses.append(loss.item())
        now = time.perf_counter()
        if step == stage.steps or now - saved > _SAVE_EVERY_S:
            _save(file, step, stage, parameters, averages, optimizer)
            saved = now
        if on_step is not None and (step % _SHOW_EVERY == 0 or step == stage.steps):
            on_step(step, stage.steps, sum(losses[-50:]) / len(losses[-50:]), (now - began) / (step - first))
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)


def _fields(
    parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor], optimizer: AdamW
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        yield f"weight/{name}", parameter.data
        yield f"mean/{name}", optimizer.state[parameter]["exp_avg"]
        yield f"square/{name}", optimizer.state[parameter]["exp_avg_sq"]
        if averages:
            yield f"average/{name}", averages[name]


def _save(
    file: Path, step: int, stage: Stage, parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor],
    optimizer: AdamW,
) -> None:  # fmt: skip
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in _fields(parameters, averages, optimizer)}
    write_durably(file, save(tensors, {"step": str(step), "stage": stage.name}))


def _load(
    file: Path, stage: Stage, parameters: Mapping[str, Tensor], averages: Mapping[str, Tensor], optimizer: AdamW
) -> int:
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as state:
        step = int(state.metadata()["step"])
        for parameter in parameters.values():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(parameter),
                "exp_avg_sq": torch.empty_like(parameter),
            }
        for name, tensor in _fields(parameters, averages, optimizer):
            tensor.copy_(state.get_tensor(name))
    return min(step, stage.steps)
