"""Where the layers of a LoRA's file go.

Layers with the names of the checkpoint, dots or underscores in them, are found there. Others are placed by diffusers'
own converters: each layer goes through as a pair whose numbers are its row numbers, and what comes out says which rows
of which layer went where. So every form takes every way of naming, and what went nowhere is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.errors import CheckpointError
from fluxkiln.export.change import Delta, LoraTensor
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Rows = NDArray[np.intp]

# How a tensor's name ends -> what it is of its layer.
LORA_ROLES: Mapping[str, str] = {
    **dict.fromkeys((".lora_A.weight", ".lora_down.weight", ".down.weight"), "down"),
    **dict.fromkeys((".lora_B.weight", ".lora_up.weight", ".up.weight"), "up"),
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"), "magnitude"),
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
}
# Of a stand-in: number of the layer and number of the row, in one number that float64 holds.
_ROW_BITS = 26


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What a file has of one layer: tensors by their role, and what is made of them.

    `ends` are the names of a pair's halves behind the layer's, as converters are given them. A bias or a norm is a
    layer of its own, whose tensor is called `whole`; they are with layers of PEFT's names.
    """

    name: str
    tensors: Mapping[str, LoraTensor]
    delta: Delta
    ends: tuple[str, str]
    whole: str = ""


# a component, a tensor of it, and for each of its rows that of the layer
LayerPlace = tuple[str, str, "Rows"]


def place_layers(file: Path, layers: list[LoraLayer], checkpoint: Checkpoint) -> list[list[LayerPlace]]:
    """Where each layer goes; nowhere for what the checkpoint and the converters do not know."""
    import numpy as np

    places: list[list[LayerPlace]] = [[] for _ in layers]
    others = []
    for number, layer in enumerate(layers):
        component, tensor = _find(layer, checkpoint)
        if tensor:
            places[number].append((component, tensor, np.arange(layer.delta.shape[0])))
        elif component == checkpoint.model.adapted and component in checkpoint.tensors:
            others.append(number)
    if others:
        for tensor, number, rows in _converted(file, layers, others, checkpoint):
            places[number].append((checkpoint.model.adapted, tensor, rows))
    return places


def _find(layer: LoraLayer, checkpoint: Checkpoint) -> tuple[str, str]:
    """The component that a layer's name says, and the tensor if the checkpoint has it by this name."""
    model = checkpoint.model
    prefixes = {f"{component}.": component for component in model.components}
    prefixes |= dict.fromkeys(("base_model.model.", "lycoris_"), model.adapted) | getattr(model, "lora_prefixes", {})
    prefix = max((one for one in prefixes if layer.name.startswith(one)), key=len, default="")
    component = prefixes.get(prefix, model.adapted)
    name = layer.name.removeprefix(prefix)
    refs, ending = checkpoint.tensors.get(component, {}), ".bias" if layer.whole.endswith(".bias") else ".weight"
    tensor = name if layer.whole == layer.name else f"{name}{ending}"
    if tensor in refs:
        return component, tensor
    flat = {one.removesuffix(ending).replace(".", "_"): one for one in refs if one.endswith(ending)}
    return component, flat.get(name, "")


def _converted(
    file: Path, layers: list[LoraLayer], numbers: list[int], checkpoint: Checkpoint
) -> Iterator[tuple[str, int, NDArray[np.intp]]]:
    """Tensor, number of the layer that goes there, and which of its rows, by diffusers' converters."""
    import numpy as np
    import torch

    placed = dict.fromkeys(numbers, 0)
    # each way of naming by itself: of two, converters leave one out
    for ends in dict.fromkeys(layers[number].ends for number in numbers):
        stand_ins = {}
        for number in (number for number in numbers if layers[number].ends == ends):
            layer, (height, width) = layers[number], layers[number].delta.shape
            rows = torch.arange(height, dtype=torch.float64) + (number << _ROW_BITS)
            if layer.whole:
                stand_ins[layer.whole] = rows
            else:  # two, since a converter may swap the halves of either
                stand_ins[layer.name + ends[0]] = torch.ones((2, 1), dtype=torch.float64).expand(2, width)
                stand_ins[layer.name + ends[1]] = torch.stack((rows, rows), 1)
        for name, tensor in _convert(file, checkpoint.model, stand_ins).items():
            end = next((end for end in LORA_ROLES if name.endswith(end)), "")
            codes = tensor.reshape(tensor.shape[0], -1)[:, 0].to(torch.int64).numpy()
            found = np.unique(codes >> _ROW_BITS)
            if LORA_ROLES.get(end) == "down" or len(found) != 1 or int(found[0]) not in placed:
                continue
            placed[int(found[0])] += len(codes)
            tensor_name = name.removeprefix(f"{checkpoint.model.adapted}.").removesuffix(end)
            tensor_name += {"up": ".weight", "bias": ".bias"}.get(LORA_ROLES.get(end, ""), "")
            yield tensor_name, int(found[0]), codes & ((1 << _ROW_BITS) - 1)
    for number, count in placed.items():
        if count not in (0, layers[number].delta.shape[0]):
            raise CheckpointError(
                f"{file} has {layers[number].name} with {layers[number].delta.shape[0]} output rows, and diffusers' "
                f"converter finds a place for {count} of them; it is for another model: give one for {checkpoint.name}"
            )


def _convert(file: Path, model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return model.convert_lora(tensors)
    except Exception as error:  # whatever the converters raise about what they do not know
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file} has layers that diffusers' converter cannot place in {model.title} ({type(error).__name__}: "
            f"{reason}); it is for another model or not whole: give the file as its trainer wrote it for {model.title}"
        ) from error
