"""What upstream's own leaf modules make in the place of a part that is cut over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.patches.flux1.kinds import NO_BLOCKS, list_parts, make_part
from fluxkiln.patches.leaves import Leaf, watch_leaves
from fluxkiln.types import Configs, Part

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module

_Values = Mapping[str, "NDArray[Any]"]
# a part -> its wrapper module with the checkpoint's weights, float32
Load = Callable[[Part], "Module"]


def see_split_leaves(
    part: Part, configs: Configs, inputs: _Values, state: _Values, load: Load
) -> tuple[Leaf, ...] | None:
    """What diffusers' and transformers' own leaf modules make, in call order, float32; None for a part that is whole.

    Args:
        part: with one block at most. inputs: by the names of its kind, and the host's constants.
        state: its weights uncut, by slot.
    """
    if part.traits.cut == "t5":
        return _see_t5(configs, inputs, state)
    if part.traits.cut == "head":
        return _see_head(configs, inputs, load)
    return _see_block(part, inputs, load) if part.traits.cut in ("double", "single") else None


def _see_t5(configs: Configs, inputs: _Values, state: _Values) -> tuple[Leaf, ...]:
    import torch
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model: Any = T5EncoderModel(T5Config(**configs["text_encoder_2"]))
    weights = {name: torch.from_numpy(np.array(weight, np.float32)) for name, weight in state.items()}
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]}, assign=True)
    seen = watch_leaves(model.eval())
    with torch.no_grad():
        model(torch.from_numpy(np.array(inputs["input_ids"], np.int64)))
    # the embedding is called by its place in the encoder, the checkpoint has it once
    return tuple(replace(leaf, name="shared" if leaf.name == "encoder.embed_tokens" else leaf.name) for leaf in seen)


def _see_head(configs: Configs, inputs: _Values, load: Load) -> tuple[Leaf, ...]:
    """The whole model's head, and the AdaLN linears of its blocks and of its tail."""
    import torch

    head = make_part("head", "head")
    module = load(head)
    seen = watch_leaves(module)
    given = [torch.from_numpy(np.array(inputs[name])) for name in head.traits.inputs if name in inputs]
    with torch.no_grad():
        *_, temb = module(*given)
    for part in list_parts({**NO_BLOCKS, **configs}, "kl", "hoisted"):
        if part.traits.family == "modulation":
            modulation = load(part)
            linears = watch_leaves(modulation)
            with torch.no_grad():
                modulation(temb)
            seen += [
                replace(leaf, name=f"{part.prefix}{leaf.name}") for leaf in linears if leaf.name.endswith("linear")
            ]
    return tuple(seen)


def _see_block(part: Part, inputs: _Values, load: Load) -> tuple[Leaf, ...]:
    """diffusers' own block, its AdaLN linears replaced by the rows that they would give."""
    import torch
    from torch import nn

    class GivenRows(nn.Module):
        """What an AdaLN norm returns: x normed and modulated, then the rows behind shift and scale."""

        def __init__(self, norm: Any, rows: Any) -> None:
            super().__init__()
            self.norm, self.rows = norm, rows

        def forward(self, x: Any, emb: Any) -> Any:
            shift, scale, *others = self.rows.unbind(1)
            return (self.norm(x) * (1 + scale[:, None]) + shift[:, None], *others)

    given = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in inputs.items()}
    module: Any = load(part)
    block, modulation, x = module.block, given["modulation"], given["hidden_states"]
    if part.kind == "double_modulated":
        block.norm1 = GivenRows(block.norm1, modulation[:, :6])
        block.norm1_context = GivenRows(block.norm1_context, modulation[:, 6:])
        streams = x, given["encoder_hidden_states"]
    else:
        block.norm = GivenRows(block.norm, modulation)
        # the block puts both together again; where they are parted is the same to it
        streams = x[:, 1:], x[:, :1]
    seen = watch_leaves(module)
    with torch.no_grad():
        block(*streams, temb=None, image_rotary_emb=(given["rotary_cos"], given["rotary_sin"]))
    return tuple(leaf for leaf in seen if leaf.type != "Dropout")
