"""A LoRA beside frozen layers, by peft, and its files: diffusers' layout, and that of the MLX FLUX example."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import ToolchainError, UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.files import write_durably
from fluxkiln.patches.model import Model

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS_FILE, MLX_FILE = "adapters.safetensors", "mlx_adapters.safetensors"
# peft's names of a pair: lora_A is [R, I], lora_B is [O, R]
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def need_peft() -> None:
    """Raise ToolchainError when peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ToolchainError("fluxkiln train needs peft, which is not installed: pip install 'fluxkiln[train]'")


@dataclass(frozen=True, slots=True)
class AdaptedLayers:
    """The linear layers that get a pair: their names, and how many blocks they are in."""

    names: tuple[str, ...]
    blocks: int


def adapted_layers(checkpoint: Checkpoint, rank: int, last: int) -> AdaptedLayers:
    """All linear layers in the last blocks of the component that LoRAs are for.

    Args:
        last: how many blocks, counted from the end of the last stack; -1 for all.

    Raises:
        UsageError: more blocks than there are, or a rank above a layer's width.
    """
    component = checkpoint.model.adapted
    shapes = {name: ref.shape for name, ref in checkpoint.tensors[component].items()}
    blocks: dict[str, list[str]] = {}
    for stack in checkpoint.model.stacks[component]:
        inside = [name for name in shapes if name.startswith(f"{stack}.")]
        for name in sorted(inside, key=lambda name: int(name.removeprefix(f"{stack}.").split(".")[0])):
            if name.endswith(".weight") and len(shapes[name]) == 2:
                number = name.removeprefix(f"{stack}.").split(".")[0]
                blocks.setdefault(f"{stack}.{number}", []).append(name.removesuffix(".weight"))
    if last > len(blocks):
        raise UsageError(f"--lora-blocks {last}: the {component} of {checkpoint.name} has {len(blocks)}; -1 is all")
    chosen = list(blocks.values())[-last:] if last > 0 else list(blocks.values())
    names = tuple(name for block in chosen for name in block)
    narrowest = min(names, key=lambda name: min(shapes[f"{name}.weight"]))
    width = min(shapes[f"{narrowest}.weight"])
    if rank > width:
        raise UsageError(
            f"--lora-rank {rank} is above the width of {narrowest}, {width}; a LoRA is smaller than what it changes: "
            "give 4 to 64"
        )
    return AdaptedLayers(names, len(chosen))


def add_adapters(module: Any, layers: AdaptedLayers, rank: int, seed: int) -> dict[str, Tensor]:
    """Put a pair beside every layer, alpha as large as the rank; its parameters by peft's names, float32.

    The same seed gives the same numbers; ups are zero, so that training begins at the checkpoint.
    """
    import torch
    from peft import LoraConfig

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        module.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers.names)))
    found = {name: one for name, one in module.named_parameters() if one.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.to(torch.float32)
    return {name.replace(".default.", "."): one for name, one in sorted(found.items())}


def write_adapters(path: Path, model: Model, parameters: Mapping[str, Tensor]) -> None:
    """A file that diffusers' `load_lora_weights` and `--lora` take; without an alpha they take the rank for it."""
    from safetensors.torch import save

    named = {f"{model.adapted}.{name}": one.detach().cpu().contiguous() for name, one in parameters.items()}
    write_durably(path, save(named, {"format": "pt"}))


def write_mlx_adapters(path: Path, model: Model, parameters: Mapping[str, Tensor], settings: Mapping[str, int]) -> bool:
    """The same for `txt2image.py --adapter` of the MLX FLUX example; False where that has no such model.

    Args:
        settings: `lora_rank` and `lora_blocks`, which its loader reads from the metadata.
    """
    from safetensors.torch import save

    pairs = {
        name.removesuffix(_DOWN): (one.detach().cpu(), parameters[name.removesuffix(_DOWN) + _UP].detach().cpu())
        for name, one in parameters.items()
        if name.endswith(_DOWN)
    }
    tensors = model.mlx_lora(pairs)
    if tensors:
        write_durably(path, save(tensors, {name: str(value) for name, value in settings.items()}))
    return bool(tensors)
