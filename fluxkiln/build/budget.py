"""How much of a model verification runs, and at which shapes: by stated budgets of multiplications.

A model whose image step is within the budget is verified whole at the shapes it is built for. Of a larger one every
part is replayed at smaller shapes, where weights, their order and their assignment show as well as at any, and some
parts are executed in the form and at the shapes they were compiled for.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.tensors import multiplications, part_refs
from fluxkiln.compile.toolchain import Work, toolchain_of
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import SIZE_MULTIPLE, Part, Shapes


@dataclass(frozen=True, slots=True)
class Limits:
    """What verification may cost, in multiplications; two cores make 5e10 to 1e11 a second in float32.

    Attributes:
        replayed: one step of the transformer at one rung. Each rung of FLUX.1-dev then takes about half a minute.
        executed: one part at the shapes it is built for, where not all of them are. A block at 1024x1024 with 512
            tokens has 6.5e11, the VAE's decoder 5e12.
        blocks: how many blocks of each kind of the transformer are executed so; of other components, one.
    """

    replayed: float = 2e12
    executed: float = 1e12
    blocks: int = 2


LIMITS = Limits()
# of a picture and of latents there are fewer
LEAST_CHANNELS = 17


def replayed_shapes(checkpoint: Checkpoint, plan: Plan, limits: Limits = LIMITS) -> Shapes:
    """The shapes at which every part is replayed: those of the build, halved until a step is within the limit, and the
    widest convolution within what the toolchain replays in seconds."""

    def half(side: int) -> int:
        return max(side // 2 // SIZE_MULTIPLE * SIZE_MULTIPLE, SIZE_MULTIPLE)

    def is_too_much(shapes: Shapes) -> bool:
        most = toolchain_of(plan.target).most_convolved
        slow = most and widest_convolution(checkpoint, plan, shapes) > most
        return bool(slow) or multiplications(checkpoint, shapes) > limits.replayed

    shapes = plan.shapes
    while is_too_much(shapes):
        smaller = Shapes(half(shapes.height), half(shapes.width), max(shapes.tokens // 2, 8))
        if smaller == shapes:
            break
        shapes = smaller
    return shapes


def widest_convolution(checkpoint: Checkpoint, plan: Plan, shapes: Shapes) -> int:
    """About how many elements the largest convolution makes: a decoder's last, of fewest channels; 0 without any."""
    parts = [part for part in plan.parts if part.traits.convolutional]
    every = (ref.shape for part in parts for ref in part_refs(checkpoint, plan, part))
    channels = [shape[0] for shape in every if len(shape) == 4 and shape[0] >= LEAST_CHANNELS and shape[-1] > 1]
    return shapes.height * shapes.width * min(channels, default=0)


def executed_parts(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, seed: int, limits: Limits = LIMITS
) -> tuple[Part, ...]:
    """The parts of a large model that are executed at the shapes of the build, in the order they run.

    Of parts that there are many of, those of some blocks of each scheme, any but the same for the same seed: kinds
    that share blocks share the choice. Of the rest, all that are within the limit.
    """
    by_kind: dict[tuple[str, Scheme], list[Part]] = {}
    for part in plan.parts:
        by_kind.setdefault((part.kind, plan.scheme(part)), []).append(part)
    chosen = set()
    for (kind, _), parts in by_kind.items():
        work = count_work(make_template(checkpoint, plan.of(parts[0]), cache, kind, plan.target.graph_format).path)
        if work.multiplications > limits.executed or not toolchain_of(plan.target).can_execute(work):
            continue
        prefixes = sorted({part.prefix for part in parts})
        count = limits.blocks if parts[0].component == "transformer" else 1
        digest = hashlib.sha256("/".join([str(seed), *prefixes]).encode()).digest()
        random = Random(int.from_bytes(digest[:8], "little"))
        picked = random.sample(prefixes, min(count, len(prefixes)))
        chosen |= {part.name for part in parts if part.prefix in picked}
    return tuple(part for part in plan.parts if part.name in chosen)


def count_work(template: Path) -> Work:
    """The work of one run of a template of any ONNX format."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(template)).graph
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
    total, widest = 0.0, 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            total += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
        elif node.op_type == "Conv":
            size = math.prod(shapes[node.output[0]])
            total += size * math.prod(shapes[node.input[1]][1:])
            widest = max(widest, size)
        elif node.op_type == "Attention":
            queries, keys = shapes[node.input[0]], shapes[node.input[1]]
            total += 2.0 * math.prod(queries) * keys[-2]
    return Work(total, widest)


def name_shapes(shapes: Shapes) -> str:
    """`1024x1024, 512 tokens`."""
    return f"{shapes.width}x{shapes.height}, {shapes.tokens} tokens"


def filling_prompt(prompt: str, tokens: int, seed: int) -> str:
    """`prompt` and then words of random letters, enough to fill all text tokens: padding would make them alike."""
    random = Random(seed)
    words = ("".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(2, 9))) for _ in range(2 * tokens))
    return " ".join([prompt, *words])
