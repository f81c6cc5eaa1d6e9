"""What an HLO module must be before Neuron's compiler is given it, and what it costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxkiln.compile.toolchains.neuron.hlo_module import ELEMENTS, entry_computation, listed_groups, parse_module
from fluxkiln.errors import CompileError

LARGEST_LITERAL = 64 * 1024
COLLECTIVES = ("all-reduce", "all-gather")
# what the parts of FLUX.1 lower to, and little else: a new one is a change of the graph that somebody should have seen
ALLOWED = frozenset({
    "abs", "add", "all-gather", "all-reduce", "and", "broadcast", "clamp", "compare", "concatenate", "constant",
    "convert", "convolution", "cosine", "divide", "dot", "erf", "exponential", "exponential-minus-one", "floor",
    "gather", "iota", "log", "log-plus-one", "logistic", "maximum", "minimum", "multiply", "negate", "not", "or", "pad",
    "parameter", "power", "reduce", "reshape", "round-nearest-even", "rsqrt", "select", "sign", "sine", "slice",
    "sqrt", "subtract", "tanh", "transpose", "tuple",
})  # fmt: skip
ALLOWED_ELEMENTS = frozenset({"pred", "s32", "f32", "bf16"})
_HIGHEST = 2  # PrecisionConfig.Precision


@dataclass(frozen=True, slots=True)
class HloFacts:
    """What a checked module does on one rank.

    Attributes:
        operations: how often each opcode occurs in the entry computation.
        all_reduce_bytes: payload of each all-reduce in program order: bytes that every rank brings and gets.
        all_gather_bytes: what each all-gather gives to every rank, in program order.
        parameter_bytes: of all parameters, activations and weights.
        flops: of dots and convolutions, two for each multiply-add.
    """

    operations: Mapping[str, int]
    all_reduce_bytes: tuple[int, ...]
    all_gather_bytes: tuple[int, ...]
    parameter_bytes: int
    flops: int


def check_hlo(proto: bytes, *, all_reduces: int, all_gathers: int, ranks: int) -> HloFacts:
    """Judge a canonical module.

    Args:
        all_reduces: how many there must be, exactly; `all_gathers` likewise.
        ranks: all collectives must have one group of all ranks, in order.

    Raises:
        CompileError: naming the first instruction that breaks a rule.
    """
    module = parse_module(proto)
    _check_ids(module)
    _check_shape(module.host_program_shape.result, "the result")
    entry = entry_computation(module)
    for computation in module.computations:
        for instruction in computation.instructions:
            _check_instruction(instruction)
        for shape in (*computation.program_shape.parameters, computation.program_shape.result):
            _check_shape(shape, f"computation {computation.name}")
        inner = [i.opcode for i in computation.instructions if i.opcode in (*COLLECTIVES, "dot", "convolution")]
        if computation is not entry and inner:
            raise CompileError(f"{inner[0]} in {computation.name}: only the entry computation has those; inline calls")
    operations = Counter(instruction.opcode for instruction in entry.instructions)
    for opcode, wanted in (("all-reduce", all_reduces), ("all-gather", all_gathers)):
        if operations[opcode] != wanted:
            raise CompileError(
                f"the module has {operations[opcode]} {opcode} operations, its parts have {wanted}; lower them again "
                "and look where one is left out or doubled"
            )
    by_id = {instruction.id: instruction for instruction in entry.instructions}
    sizes: dict[str, list[int]] = {opcode: [] for opcode in (*COLLECTIVES, "parameter")}
    for instruction in entry.instructions:
        if instruction.opcode in COLLECTIVES:
            _check_collective(instruction, ranks)
        if instruction.opcode in ("dot", "convolution"):
            _check_precision(instruction, by_id)
        if instruction.opcode in sizes:
            sizes[instruction.opcode].append(_bytes(instruction.shape))
    return HloFacts(
        operations=dict(operations),
        all_reduce_bytes=tuple(sizes["all-reduce"]),
        all_gather_bytes=tuple(sizes["all-gather"]),
        parameter_bytes=sum(sizes["parameter"]),
        flops=sum(_flops(i, by_id) for i in entry.instructions),
    )


def _check_ids(module: Any) -> None:
    """Numbered from 1 in program order, operands and callees before their users."""
    count = 0
    computations: set[int] = set()
    for number, computation in enumerate(module.computations, start=1):
        _check_id(computation.id, number, f"computation {computation.name}")
        here: set[int] = set()
        for instruction in computation.instructions:
            count += 1
            _check_id(instruction.id, count, f"instruction {instruction.name}")
            unknown = set(instruction.operand_ids) - here | set(instruction.called_computation_ids) - computations
            if unknown:
                raise CompileError(f"{instruction.name} refers to id {min(unknown)}, which is not before it; {_AGAIN}")
            here.add(instruction.id)
        if computation.root_id not in here:
            raise CompileError(f"{computation.name} has root {computation.root_id}, which it does not hold; {_AGAIN}")
        computations.add(computation.id)
    if module.entry_computation_id not in computations:
        raise CompileError(f"the entry computation {module.entry_computation_id} is not there; {_AGAIN}")


_AGAIN = "the proto is damaged or not canonical, lower and canonicalise it again"


def _check_id(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise CompileError(f"{what} has id {found}, ids count from 1 in program order ({wanted} here); {_AGAIN}")


def _check_instruction(instruction: Any) -> None:
    if instruction.opcode == "custom-call":
        raise CompileError(
            f"{instruction.name} is a custom call of {instruction.custom_call_target!r}, which Neuron's compiler does "
            "not have; write the operation with others"
        )
    if instruction.opcode not in ALLOWED:
        raise CompileError(
            f"{instruction.name}: operation {instruction.opcode!r} is not among those that parts are made of "
            f"({', '.join(sorted(ALLOWED))}); write it with these, or add it to the list with a reason"
        )
    _check_shape(instruction.shape, instruction.name)
    if len(instruction.literal) > LARGEST_LITERAL:
        raise CompileError(
            f"{instruction.name} is a literal of {len(instruction.literal)} bytes, at most {LARGEST_LITERAL} are "
            "allowed; make it a parameter"
        )


def _check_shape(shape: Any, what: str) -> None:
    element = ELEMENTS.get(shape.element_type, (f"type {shape.element_type}", 0))[0]
    if element == "tuple":
        for part in shape.tuple_shapes:
            _check_shape(part, what)
        return
    if element not in ALLOWED_ELEMENTS:
        raise CompileError(
            f"{what} has elements of {element}, Neuron takes {', '.join(sorted(ALLOWED_ELEMENTS))}; cast it, or "
            "compute it on the host"
        )
    if any(shape.is_dynamic_dimension):
        raise CompileError(
            f"{what} has a dynamic dimension in {list(shape.dimensions)}, all must be static; lower it for one size"
        )


def _check_collective(instruction: Any, ranks: int) -> None:
    groups, everyone = listed_groups(instruction), (tuple(range(ranks)),)
    if groups != everyone:
        raise CompileError(
            f"{instruction.name} has replica groups {_braces(groups)}, they must be {_braces(everyone)}: all ranks in "
            "order; lower it for this number of ranks"
        )
    if instruction.HasField("collective_device_list") or not instruction.replica_groups:
        raise CompileError(f"{instruction.name} has its replica groups in the newer field; {_AGAIN}")
    if instruction.channel_id or instruction.use_global_device_ids:
        raise CompileError(
            f"{instruction.name} has channel {instruction.channel_id}, use_global_device_ids "
            f"{instruction.use_global_device_ids}: replica groups would not name replicas; lower it with this frontend"
        )


def _check_precision(instruction: Any, by_id: Mapping[int, Any]) -> None:
    """Products of float32 are computed in float32, whatever the device would do for speed."""
    asked = instruction.precision_config
    wide = any(ELEMENTS[by_id[i].shape.element_type][0] == "f32" for i in instruction.operand_ids)
    if asked.algorithm or (wide and list(asked.operand_precision) != [_HIGHEST, _HIGHEST]):
        raise CompileError(
            f"{instruction.name} asks for precision {list(asked.operand_precision)}, algorithm {asked.algorithm}; "
            f"products of float32 need [{_HIGHEST}, {_HIGHEST}] (HIGHEST), algorithm 0; lower it with this frontend"
        )


def _braces(groups: tuple[tuple[int, ...], ...]) -> str:
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


def _bytes(shape: Any) -> int:
    if shape.tuple_shapes:
        return sum(_bytes(part) for part in shape.tuple_shapes)
    return int(math.prod(shape.dimensions)) * ELEMENTS[shape.element_type][1]


def _flops(instruction: Any, by_id: Mapping[int, Any]) -> int:
    result = int(math.prod(instruction.shape.dimensions))
    if instruction.opcode == "dot":
        left = by_id[instruction.operand_ids[0]].shape.dimensions
        summed = instruction.dot_dimension_numbers.lhs_contracting_dimensions
        return 2 * result * int(math.prod(left[i] for i in summed))
    if instruction.opcode == "convolution":
        kernel = by_id[instruction.operand_ids[1]].shape.dimensions
        outputs = kernel[instruction.convolution_dimension_numbers.kernel_output_feature_dimension]
        return 2 * result * int(math.prod(kernel)) // int(outputs)
    return 0
