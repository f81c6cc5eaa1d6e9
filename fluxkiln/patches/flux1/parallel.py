"""From a kind, configs and shapes to a tensor-parallel part: a module with the local shapes of one rank.

A part holds one kind, several successive blocks of a kind, or the whole transformer, all made of the same modules:
`fluxkiln.patches.flux1.parallel_transformer` and `fluxkiln.patches.flux1.text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxkiln.errors import UsageError
from fluxkiln.patches.cut import Collectives, ParallelPart, local_shape
from fluxkiln.patches.flux1.inputs import input_shapes
from fluxkiln.patches.flux1.kinds import ALL_KINDS, CUTS, MODULATION_CHUNKS, head_count
from fluxkiln.patches.flux1.parallel_transformer import ParallelDouble, ParallelHead, ParallelSingle, ParallelTail
from fluxkiln.patches.flux1.parts import build_part
from fluxkiln.patches.flux1.patches import PARALLEL_TEXT, PARALLEL_TRANSFORMER
from fluxkiln.patches.flux1.text import ParallelT5
from fluxkiln.patches.patch import check_patches
from fluxkiln.types import Configs, Shapes, TensorSpec

# in the order in which they run; `transformer` is all but t5 in one module
PARALLEL_KINDS = ("t5", "head", "double", "single", "tail", "transformer")
# What is never rounded to the weights' dtype: the 8 bits of a bfloat16 are too few for an angle.
FLOAT32_INPUTS = ("timestep", "guidance", "rotary_cos", "rotary_sin")


def build_parallel_part(
    kind: str, configs: Configs, shapes: Shapes, collectives: Collectives, *, blocks: int = 1
) -> ParallelPart:
    """The module of `kind` for one of `collectives.ranks` ranks; shapes and structure, no weight memory.

    Args:
        kind: one of `PARALLEL_KINDS`.
        configs: each component's `config.json`, keyed by its folder name.
        blocks: for double and single: how many successive blocks the module holds.

    Raises:
        UsageError: no such kind, a weight the ranks cannot share, or several blocks of a kind that has one.
        PatchError: upstream changed. CheckpointError: a structure the parts do not cover.
    """
    if kind not in PARALLEL_KINDS:
        raise UsageError(f"no kind of tensor-parallel part is called {kind!r}; there are {', '.join(PARALLEL_KINDS)}")
    if blocks < 1 or (blocks > 1 and kind not in ("double", "single")):
        raise UsageError(f"{blocks} blocks in a part of kind {kind}: double and single take 1 or more, the others 1")
    check_patches(PARALLEL_TEXT if kind == "t5" else PARALLEL_TRANSFORMER)
    members: tuple[str, ...] = (kind,) * blocks
    if kind == "transformer":
        doubles, singles = _block_counts(configs)
        members = ("head", *("double",) * doubles, *("single",) * singles, "tail")
    modules = [_build_member(member, configs, collectives) for member in members]
    if kind == "transformer":
        module: nn.Module = WholeTransformer(members, modules, configs)
    else:
        module = modules[0] if blocks == 1 else BlockGroup(kind, modules)
    # the kind with the same interface, but for the rows of several blocks
    traits = next(one for one in ALL_KINDS.values() if one.cut == kind)
    inputs = input_shapes(traits, configs, shapes)
    if "modulation" in inputs:
        _, rows, width = inputs["modulation"]
        inputs["modulation"] = (1, blocks * rows, width)
    return ParallelPart(
        module.eval().requires_grad_(False),
        tuple(TensorSpec(name, shape, _INTEGERS.get(name, "float32")) for name, shape in inputs.items()),
        traits.outputs,
        tuple(TensorSpec(name, tuple(weight.shape)) for name, weight in module.named_parameters()),
        all_reduces=sum(_reductions(member, configs) for member in members),
        all_gathers=members.count("head"),
        float32_inputs=FLOAT32_INPUTS,
    )


def modulation_rows(configs: Configs) -> dict[str, tuple[int, int]]:
    """Rows [start, stop) of the head's modulation by the part they are for: `double.00`, ..., `single.00`, ..., `tail`.

    Successive blocks have successive rows; a part of several blocks takes them together.
    """
    doubles, singles = _block_counts(configs)
    names = [f"double.{i:02d}" for i in range(doubles)] + [f"single.{i:02d}" for i in range(singles)] + ["tail"]
    rows, start = {}, 0
    for name in names:
        stop = start + MODULATION_CHUNKS[name.partition(".")[0]]
        rows[name] = (start, stop)
        start = stop
    return rows


class BlockGroup(nn.Module):
    """Successive blocks of a kind; as `ParallelDouble` or `ParallelSingle`, with the rows of all as modulation."""

    def __init__(self, kind: str, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rows = MODULATION_CHUNKS[kind]
        for i, block in enumerate(blocks):
            self.add_module(str(i), block)

    def forward(self, *activations: Tensor) -> Any:
        *streams, modulation, rotary_cos, rotary_sin = activations
        for block, rows in zip(self.children(), torch.split(modulation, self.rows, dim=1), strict=True):
            made = block(*streams, rows, rotary_cos, rotary_sin)
            streams = list(made) if isinstance(made, tuple) else [made]
        return made


class WholeTransformer(nn.Module):
    """Head, all blocks and tail: `FluxTransformer2DModel.forward` but for the rotary embedding, which is an input.

    Inputs: the head's, then rotary_cos, rotary_sin [J, K] float32. Output: sample [1, S, 4C].
    """

    def __init__(self, kinds: Sequence[str], members: Sequence[nn.Module], configs: Configs) -> None:
        super().__init__()
        self.kinds, self.rows = tuple(kinds), tuple(modulation_rows(configs).values())
        for i, member in enumerate(members):
            self.add_module(str(i), member)

    def forward(self, *activations: Tensor) -> Tensor:
        *embedded, rotary_cos, rotary_sin = activations
        head, *blocks, tail = self.children()
        hidden_states, encoder_hidden_states, modulation = head(*embedded)
        of_block = [modulation[:, start:stop] for start, stop in self.rows]
        tokens, rotary, doubles = encoder_hidden_states.shape[1], (rotary_cos, rotary_sin), self.kinds.count("double")
        for block, rows in zip(blocks[:doubles], of_block, strict=False):
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, rows, *rotary)
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        for block, rows in zip(blocks[doubles:], of_block[doubles:-1], strict=True):
            hidden_states = block(hidden_states, rows, *rotary)
        sample: Tensor = tail(hidden_states[:, tokens:], of_block[-1])
        return sample


_INTEGERS = {"input_ids": "int32", "position_buckets": "int32"}


def _block_counts(configs: Configs) -> tuple[int, int]:
    return int(configs["transformer"]["num_layers"]), int(configs["transformer"]["num_single_layers"])


def _reductions(kind: str, configs: Configs) -> int:
    if kind == "t5":
        return 2 * int(configs["text_encoder_2"]["num_layers"])
    return {"double": 2, "single": 1}.get(kind, 0)


def _build_member(kind: str, configs: Configs, collectives: Collectives) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        if kind == "t5":
            build_part("t5_block", configs)  # refuses what is not FLUX.1's T5
            module: nn.Module = ParallelT5(T5EncoderModel(T5Config(**configs["text_encoder_2"])), collectives)
        elif kind == "head":
            module = ParallelHead(build_part("head", configs), _modulation_norms(configs), collectives)
        elif kind == "double":
            module = ParallelDouble(build_part("double_modulated", configs).block, collectives)
        elif kind == "single":
            module = ParallelSingle(build_part("single_modulated", configs).block, collectives)
        else:
            module = ParallelTail(build_part("tail_modulated", configs))
    heads = head_count(kind, configs)
    for name, weight in tuple(module.named_parameters()):
        shape = local_shape(CUTS[kind], name, tuple(weight.shape), heads, collectives.ranks)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight.new_empty(shape), requires_grad=False))
    return module


def _modulation_norms(configs: Configs) -> dict[str, nn.Module]:
    """The AdaLN norms of the transformer as modules that have their linear alone, by name, in the order of the rows."""
    doubles, singles = _block_counts(configs)
    flux = configs["transformer"]
    width = int(flux["num_attention_heads"]) * int(flux["attention_head_dim"])
    chunks = {
        **{f"transformer_blocks.{i}.{name}": 6 for i in range(doubles) for name in ("norm1", "norm1_context")},
        **{f"single_transformer_blocks.{i}.norm": MODULATION_CHUNKS["single"] for i in range(singles)},
        "norm_out": MODULATION_CHUNKS["tail"],
    }
    return {name: nn.ModuleDict({"linear": nn.Linear(width, count * width)}) for name, count in chunks.items()}
