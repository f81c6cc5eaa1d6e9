"""Which value of a split part is the output of which of diffusers' modules, put together from what the ranks have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.components import KINDS, Part, list_parts
from fluxkiln.errors import PatchError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.leaves import Leaf, load_whole, see_leaves, watch_leaves
from fluxkiln.export.split import WHOLE_KINDS
from fluxkiln.patches.flux1.cuts import find_cut
from fluxkiln.verify.debug.bisect import Finding, Tolerance
from fluxkiln.verify.metrics import compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.values import Operation

Values = Mapping[str, "NDArray[Any]"]
# beyond this it is another value, not the same one with an error
_SAME = 0.5


def see_split_leaves(part: Part, checkpoint: Checkpoint, inputs: Values, state: Values) -> tuple[Leaf, ...]:
    """What diffusers' and transformers' own leaf modules make in the place of a split part, in call order, float32.

    Args:
        part: of a split model, with one block at most. inputs: by the names of its kind, and the host's constants.
        state: its weights uncut, by slot.
    """
    if part.kind == "t5":
        return _see_t5(checkpoint, inputs, state)
    if part.kind == "modulated_head":
        return _see_head(checkpoint, inputs)
    if part.kind in ("double_modulated", "single_modulated"):
        return _see_block(part, checkpoint, inputs)
    return see_leaves(part, checkpoint, inputs)


def match_split(
    leaves: Sequence[Leaf],
    operations: Sequence[Operation],
    seen: Sequence[Values],
    cut_kind: str,
    tolerance: Tolerance,
    results: Values,
) -> list[Finding]:
    """A finding for every module whose output the ranks have, in the order the modules ran, then for the results.

    With weights of its own a module is the last operation that reads them; without any, the nearest value.

    Args:
        seen: of each rank its values, float32 arithmetic.
        cut_kind: the kind in the table of cuts.
        results: value -> what the whole part makes of it, of those that are its outputs.
    """
    findings: list[Finding] = []
    for leaf in leaves:
        own = [op for op in operations if any(_module(slot) == leaf.name for slot in op.slots)]
        if own:
            value: str | None = own[-1].output
            found = _assemble(own[-1], leaf, operations, seen, cut_kind)
        else:
            value, found = _nearest(leaf, seen)
        if value is not None and found is not None:
            findings.append(_judge(value, found, leaf.output, tolerance))
    judged = {finding.value for finding in findings}
    findings += [
        _judge(value, seen[0][value], expected, tolerance) for value, expected in results.items() if value not in judged
    ]
    return findings


def _judge(value: str, found: NDArray[Any], expected: NDArray[Any], tolerance: Tolerance) -> Finding:
    metrics = compare(found.reshape(expected.shape), expected)
    size = metrics.relative_l2
    missed = "" if size <= tolerance.own else "own" if metrics.finite else "finite"
    last = int(expected.shape[-1])
    return Finding(value, size, metrics.worst_channel, size, missed, (), last * bool(missed), last)


def added_on_every_rank(
    finding: Finding, leaf_output: NDArray[Any], found: NDArray[Any], bias: NDArray[Any], ranks: int
) -> bool:
    """Whether what is too much in a module's output is its bias, once for every rank but the first."""
    if finding.missed != "own" or bias.shape != leaf_output.shape[-1:] or not np.any(bias):
        return False
    surplus = np.broadcast_to((ranks - 1) * bias, leaf_output.shape)
    return compare(found.reshape(leaf_output.shape) - leaf_output, surplus).relative_l2 < 1e-2


def assembled(
    value: str, leaf: Leaf, operations: Sequence[Operation], seen: Sequence[Values], cut_kind: str
) -> NDArray[Any] | None:
    """The module's output as the ranks together have it in `value`."""
    operation = next(one for one in operations if one.output == value)
    return _assemble(operation, leaf, operations, seen, cut_kind)


def _see_t5(checkpoint: Checkpoint, inputs: Values, state: Values) -> tuple[Leaf, ...]:
    import torch
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model: Any = T5EncoderModel(T5Config(**checkpoint.configs["text_encoder_2"]))
    weights = {name: torch.from_numpy(np.array(weight, np.float32)) for name, weight in state.items()}
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]}, assign=True)
    seen = watch_leaves(model.eval())
    with torch.no_grad():
        model(torch.from_numpy(np.array(inputs["input_ids"], np.int64)))
    # the embedding is called by its place in the encoder, the checkpoint has it once
    return tuple(replace(leaf, name="shared" if leaf.name == "encoder.embed_tokens" else leaf.name) for leaf in seen)


def _see_head(checkpoint: Checkpoint, inputs: Values) -> tuple[Leaf, ...]:
    """The whole model's head, and the AdaLN linears of its blocks and of its tail."""
    import torch

    head = Part("head", "head")
    module = load_whole(head, checkpoint)
    seen = watch_leaves(module)
    given = [torch.from_numpy(np.array(inputs[name])) for name in KINDS["head"].inputs if name in inputs]
    with torch.no_grad():
        *_, temb = module(*given)
    configs = {"text_encoder_2": {"num_layers": 0}, **checkpoint.configs}
    for part in list_parts(configs, "kl", "hoisted"):
        if part.kind.endswith("_modulation"):
            linears = see_leaves(part, checkpoint, {"temb": temb.numpy()})
            seen += [
                replace(leaf, name=f"{part.prefix}{leaf.name}") for leaf in linears if leaf.name.endswith("linear")
            ]
    return tuple(seen)


def _see_block(part: Part, checkpoint: Checkpoint, inputs: Values) -> tuple[Leaf, ...]:
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
    module: Any = load_whole(part, checkpoint)
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


def _module(slot: str) -> str:
    """`proj_out.weight_mlp` -> `proj_out`."""
    return slot.rpartition(".")[0]


def _assemble(
    operation: Operation, leaf: Leaf, operations: Sequence[Operation], seen: Sequence[Values], cut_kind: str
) -> NDArray[Any] | None:
    """Columns side by side, partial sums added, what is whole from rank 0; None where it is not the module's output."""
    own, wanted = seen[0][operation.output], leaf.output.shape
    if own.size != leaf.output.size:
        return _side_by_side(operation.output, wanted, seen)
    if not _partial(operation, operations, cut_kind):
        return own
    total: NDArray[Any] = np.sum([rank[operation.output] for rank in seen], axis=0)
    return total


def _side_by_side(value: str, wanted: tuple[int, ...], seen: Sequence[Values]) -> NDArray[Any] | None:
    shape = seen[0][value].shape
    if len(shape) != len(wanted):
        return None
    axes = [axis for axis in range(len(shape)) if shape[axis] != wanted[axis]]
    if len(axes) != 1 or not shape[axes[0]] < wanted[axes[0]] <= shape[axes[0]] * len(seen):
        return None
    joined: NDArray[Any] = np.concatenate([rank[value] for rank in seen], axis=axes[0])
    return np.take(joined, range(wanted[axes[0]]), axis=axes[0])  # heads beyond are padding


def _partial(operation: Operation, operations: Sequence[Operation], cut_kind: str) -> bool:
    """Whether the value is one of partial sums: made of a product with rows of a weight, and not reduced yet."""
    makers = {one.output: one for one in operations}
    pending, reached = [operation], set()
    while pending:
        one = pending.pop()
        if one.op_type == "all-reduce" or one.output in reached:
            continue
        reached.add(one.output)
        if one.op_type == "dot" and any(_is_row(cut_kind, slot) for slot in one.slots):
            return True
        pending += [makers[name] for name in one.inputs if name in makers and one.op_type != "dot"]
    return False


def _is_row(cut_kind: str, slot: str) -> bool:
    if cut_kind in WHOLE_KINDS:
        return False
    try:
        return find_cut(cut_kind, slot).way == "row"
    except PatchError:
        return False


def _nearest(leaf: Leaf, seen: Sequence[Values]) -> tuple[str | None, NDArray[Any] | None]:
    """The value nearest to what a module without weights made, if any comes near at all."""
    best: tuple[float, str | None, NDArray[Any] | None] = (_SAME, None, None)
    for name, own in seen[0].items():
        same = own.size == leaf.output.size
        found = own if same else _side_by_side(name, leaf.output.shape, seen)
        if found is not None:
            distance = compare(found.reshape(leaf.output.shape), leaf.output).relative_l2
            if distance < best[0]:
                best = (distance, name, found)
    return best[1], best[2]
