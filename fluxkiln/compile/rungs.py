"""The rungs that every parity ladder has: what runs a part at each of them, with one part's weights in memory.

Every runner takes the parts of the plan it was made for, at that plan's shapes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.corrections import part_packers
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchain import Rungs, toolchain_of
from fluxkiln.compile.weights import part_rounders
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounders import as_compiler
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import PartRunner, WeightReader, find_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.runner import Filling, Rewrite
    from fluxkiln.quantize.side_tensors import PackerOf


def stored_rung(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> Rungs:
    """The rung `dequantized` of parts at the shapes of the build, in little memory; none where it says nothing new."""
    from fluxkiln.compile.onnx.runner import attention_by_heads

    if not _stores_otherwise(plan):
        return {}
    return {"dequantized": dequantized_rung(checkpoint, plan, cache, 0, attention_by_heads)}


def _stores_otherwise(plan: Plan) -> bool:
    """Whether weights as the target stores them are others than the checkpoint's."""
    if not toolchain_of(plan.target).converts:
        return plan.quantized
    return any(plan.scheme(part).arithmetic != "F32" for part in plan.parts)


def rungs_below(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1) -> Rungs:
    """The rungs that need nothing but the checkpoint: patched, onnxruntime, and dequantized where that is another.

    Args:
        threads: of ONNX Runtime; PyTorch takes all cores.
    """
    from fluxkiln.export.eager import PatchedRunner

    rungs: Rungs = {
        "patched": PatchedRunner(checkpoint, plan.parts),
        "onnxruntime": onnxruntime_rung(checkpoint, plan, cache, threads),
    }
    if _stores_otherwise(plan):
        rungs["dequantized"] = dequantized_rung(checkpoint, plan, cache, threads)
    return rungs


def onnxruntime_rung(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1) -> PartRunner:
    """The templates of opset 23 on ONNX Runtime, fed with the checkpoint's weights."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    return TemplateRunner(partial(_fill, checkpoint, plan, cache), threads=threads)


def dequantized_rung(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1, rewrite: Rewrite | None = None
) -> PartRunner:
    """The templates of opset 17 fed with the weights as the scheme stores them, float32 arithmetic."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    return TemplateRunner(partial(_fill_stored, checkpoint, plan, cache), rewrite=rewrite, threads=threads)


def _fill(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, name: str) -> Filling:
    from fluxkiln.compile.onnx.runner import Filling

    part = find_part(plan.parts, name)
    template = make_template(checkpoint, plan, cache, part.kind, "onnx23")
    return Filling(template, weight_reader(bind_part(part, template.slots, checkpoint), checkpoint))


def _fill_stored(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, name: str) -> Filling:
    from fluxkiln.compile.onnx.filled import quantized_matmuls
    from fluxkiln.compile.onnx.runner import Filling

    part = find_part(plan.parts, name)
    template, scheme = make_template(checkpoint, plan, cache, part.kind, "onnx17"), plan.scheme(part)
    matmuls = quantized_matmuls(template.path, {spec.name for spec in template.inputs})
    quantized = {slot for slot, _ in matmuls if not scheme.keeps(slot)}
    reader = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
    packer_of = part_packers(checkpoint, plan, cache, part)
    if packer_of is not None:
        return Filling(template, partial(_sided, reader, scheme, quantized, packer_of))
    return Filling(template, partial(_stored, reader, scheme, quantized, part_rounders(checkpoint, plan, cache, part)))


def _sided(reader: WeightReader, scheme: Scheme, quantized: set[str], packer_of: PackerOf, slot: str) -> NDArray[Any]:
    if slot not in quantized:
        return _stored(reader, scheme, quantized, as_compiler, slot)
    return packer_of(slot, None)(reader(slot)).dequantize(scheme.group_size)


def _stored(
    reader: WeightReader, scheme: Scheme, quantized: set[str], rounder_of: RounderOf, slot: str
) -> NDArray[Any]:
    from fluxkiln.quantize.rounders import stored_weight

    rounder = rounder_of(slot, None) if slot in quantized and scheme.weight_bits else None
    return stored_weight(reader(slot), scheme, slot in quantized, rounder)
