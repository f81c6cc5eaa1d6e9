"""A pipeline on parts in place of its models; and diffusers' own, with the weights of one unit in memory at a time.

Streamed models are the published classes, built from their configs. A unit (a block; or what is not inside one) gets
its weights right before its forward and loses them right after, by forward hooks: nothing upstream is replaced.
Checked with diffusers 0.42.1 and transformers 5.23.0.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fluxkiln.errors import CheckpointError, PatchError
from fluxkiln.export.checkpoint import Checkpoint, TensorReader
from fluxkiln.patches.model import Model
from fluxkiln.patches.pipeline import OnLatents, PartChain, PipelineFiles, Rendering, Sampling
from fluxkiln.types import Part, PartRunner, Shapes, check_steps


@dataclass(frozen=True, slots=True)
class PipelineResult(Rendering):
    """A rendering by parts. `seconds_by_kind` and `calls_by_kind` are sums over all parts of a kind and all steps."""

    seconds_by_kind: Mapping[str, float]
    calls_by_kind: Mapping[str, int]


def run_with_parts(
    model: Model,
    files: PipelineFiles,
    shapes: Shapes,
    parts: tuple[Part, ...],
    run_part: PartRunner,
    sampling: Sampling | None = None,
    on_latents: OnLatents | None = None,
) -> PipelineResult:
    """Make an image with `run_part` in place of the models, as `fluxkiln generate` does.

    Args:
        shapes: the shapes the parts were made for.
        parts: all parts in the order they run; which VAE and which form of the transformer is meant is seen from them.
            Of the hoisted form, the parts that take all steps at once run before the first step.
        on_latents: called after each denoising step.

    Raises:
        ShapeError: the host constants were made for other shapes. UsageError: too many steps for the hoisted form.
        Whatever `run_part` raises.
    """
    sampling = sampling or Sampling()
    check_steps(parts, sampling.steps)
    chain = PartChain(parts, run_part)
    pipe = model.build_pipeline(files, chain, shapes)
    start = time.perf_counter()
    encoded, _ = pipe.encode(sampling.prompt)
    for latents in pipe.denoise(encoded, steps=sampling.steps, guidance=sampling.guidance_scale, seed=sampling.seed):
        if on_latents:
            on_latents(latents)
    image = pipe.decode(latents)
    embeds, seconds = (encoded["prompt_embeds"], encoded["pooled_prompt_embeds"]), time.perf_counter() - start
    return PipelineResult(latents, image, *embeds, seconds, dict(chain.seconds), dict(chain.calls))


@dataclass(frozen=True, slots=True)
class _Unit:
    """A module that is given its weights as a whole: owner, name in the owner, name in the state dict."""

    component: str
    module: nn.Module
    weights: tuple[tuple[nn.Module, str, str], ...]


def open_pipeline(checkpoint: Checkpoint, folders: Mapping[str, str]) -> Any:
    """diffusers' pipeline of a checkpoint in float32 on the CPU, whose weights are read while it runs.

    What it computes equals, bit for bit, what its `from_pretrained(root, dtype=torch.float32)` computes.

    Args:
        folders: the components that it has -> where their weights are, `vae_tiny` for the tiny VAE say; the others are
            None, and need not be in the checkpoint.

    Raises:
        CheckpointError: a folder is not there.
        PatchError: a model has a buffer whose values are unknown; upstream changed.
    """
    model, root = checkpoint.model, checkpoint.root
    for folder in folders.values():
        if not (root / folder).is_dir():
            raise CheckpointError(
                f"{root} has no folder {folder}: put {model.classes[folder]} there, or build without it (VAE=kl)"
            )
    made = {name: unloaded_component(model, root, folder) for name, folder in folders.items()}
    for name, module in made.items():
        stacks = model.stacks.get(name)
        _stream(module.eval().requires_grad_(False), stacks, folders[name], TensorReader(checkpoint))
    absent = {name: None for name in model.components if name not in made}
    missing = {tokenizer: None for name, tokenizer in model.tokenizers.items() if name in absent}
    return model.load_pipeline_class().from_pretrained(root, **made, **absent, **missing)


def shorten(pipe: Any, model: Model, prefixes: Collection[str]) -> None:
    """Leave every block out of a streamed pipeline but those that `prefixes` names (`transformer_blocks.3.`).

    The blocks left are chained in their order. Where the first block makes what the others need it stays as well. Call
    it after the observers have found their modules.
    """
    for component, stacks in model.stacks.items():
        module = getattr(pipe, component)
        for stack in stacks if module is not None else ():
            blocks = [
                block
                for index, block in enumerate(module.get_submodule(stack))
                if f"{stack}.{index}." in prefixes or (index == 0 and stack in model.first_is_needed)
            ]
            module.set_submodule(stack, nn.ModuleList(blocks))


@contextmanager
def weights_in_place() -> Iterator[None]:
    """Run a streamed pipeline in this block: PatchError where torch finds a module without its weights."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise PatchError(
            f"a module ran without its weights ({str(error).splitlines()[0]}): upstream no longer calls it as a "
            "module; install the versions pinned in constraints.txt"
        ) from error


class _ParametersOnMeta(TorchFunctionMode):
    """What is made by `torch.empty`, as parameters are, gets no memory; buffers have values and are made as ever."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def unloaded_component(model: Model, root: Path, folder: str) -> Any:
    """The module of a folder by its config alone: parameters on the meta device, buffers with their values."""
    made = model.load_class(folder)
    with _ParametersOnMeta():
        if hasattr(made, "load_config"):  # diffusers'
            return made.from_config(made.load_config(root / folder))
        return made(made.config_class.from_pretrained(root / folder))


def _stream(model: nn.Module, stacks: Collection[str] | None, component: str, read: TensorReader) -> None:
    """Put hooks on the units of `model`, its parameters on the meta device, and nothing else."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one has its first name
    units = []
    for module in [model] if stacks is None else _units(model, stacks):
        weights = [
            (owner, leaf) for owner in module.modules() for leaf, one in owner._parameters.items() if one is not None
        ]
        named = tuple((owner, leaf, names[id(owner._parameters[leaf])]) for owner, leaf in weights)
        units += [_Unit(component, module, named)] if named else []
    for unit in units:
        _unload(unit)  # norms are made of ones
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise PatchError(f"{type(model).__name__} has a buffer {name} without values; install the pinned versions")
    for index, unit in enumerate(units):
        then = [name for following in units[index + 1 : index + 2] for _, _, name in following.weights]
        unit.module.register_forward_pre_hook(partial(_load, unit, then, read))
        unit.module.register_forward_hook(partial(_unload, unit), always_call=True)
    # what diffusers asks where a model computes whose parameters are elsewhere
    model._hf_hook = SimpleNamespace(execution_device="cpu")  # type: ignore[assignment]


def _units(module: nn.Module, stacks: Collection[str], path: str = "") -> Iterator[nn.Module]:
    """The blocks of the stacks, and whole what has no stack inside."""
    for name, child in module.named_children():
        place = f"{path}{name}"
        if place in stacks:
            yield from child.children()
        elif any(stack.startswith(f"{place}.") for stack in stacks):
            yield from _units(child, stacks, f"{place}.")
        else:
            yield child


def _load(unit: _Unit, then: list[str], read: TensorReader, *_: Any) -> None:
    for owner, leaf, name in unit.weights:
        values = torch.from_numpy(read(unit.component, name).astype(np.float32))
        expected = owner._parameters[leaf]
        assert expected is not None
        if values.shape != expected.shape:
            raise CheckpointError(
                f"tensor {name} of {unit.component} has shape {list(values.shape)}, its config.json asks for "
                f"{list(expected.shape)}; they belong to different checkpoints"
            )
        owner._parameters[leaf] = nn.Parameter(values, requires_grad=False)
    if then:
        read.expect(unit.component, then)


def _unload(unit: _Unit, *_: Any) -> None:
    for owner, leaf, _name in unit.weights:
        parameter = owner._parameters[leaf]
        assert parameter is not None
        owner._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
