"""LoRAs for FLUX.1's transformer, by the names that people have, as diffusers calls its tensors.

diffusers' own converters do it (diffusers.loaders.FluxLoraLoaderMixin.lora_state_dict): PEFT's and diffusers' names,
kohya's and ComfyUI's with fused qkv and linear1, XLabs', Black Forest Labs' own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

# The roots of Black Forest Labs' own names, which PEFT writes behind the same prefix as diffusers' names.
_ORIGINAL = re.compile(r"(double_blocks|single_blocks|final_layer|img_in|txt_in|time_in|vector_in|guidance_in)\b")
_PEFT_PREFIX = "base_model.model."
_SWAPPED = "final_layer.adaLN_modulation.1.lora_A.weight"


def convert_lora(tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
    """Tensors by diffusers' names, and alphas; whatever the converters raise."""
    from diffusers.loaders import FluxLoraLoaderMixin

    # A copy: converters empty what they are given.
    converted, alphas = FluxLoraLoaderMixin.lora_state_dict(_prepare(dict(tensors)), return_alphas=True)
    return converted, alphas or {}


def _prepare(tensors: Tensors) -> Tensors:
    """Names and alphas that diffusers' converters do not take as they are meant."""
    stripped = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    if len(stripped) == len(tensors) and not any(map(_ORIGINAL.match, stripped)):
        # What PEFT saves by itself; behind this prefix diffusers looks for the original names only.
        tensors = stripped
    for name in [name for name in tensors if "final_layer" in name and name.endswith(".alpha")]:
        # Thrown away by the converter, which scales all the other layers of this form.
        alpha, layer = tensors.pop(name), name.removesuffix(".alpha")
        up = f"{layer}.lora_up.weight"
        if up in tensors:
            tensors[up] = tensors[up] * (float(alpha) / tensors[up].shape[1])
    if _SWAPPED in tensors:
        # The converter swaps scale and shift, which are halves of the output, in this matrix of ranks as well: undo it.
        tensors[_SWAPPED] = tensors[_SWAPPED].roll((tensors[_SWAPPED].shape[0] + 1) // 2, 0)
    return tensors
