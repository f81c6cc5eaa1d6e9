"""HLO module protos: read by descriptors of our own, without TensorFlow or a generated file, and in one form for equal
modules, which older readers of the proto take too.

jaxlib numbers instructions beyond 32 bits, on which a Neuron compiler was seen to end, names them after Python
functions, records source files, and writes replica groups into a field that older readers do not know.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

from fluxkiln.errors import CompileError
from fluxkiln.types import TensorSpec

# PrimitiveType -> name as XLA's text form has it, bytes of an element
ELEMENTS = {
    1: ("pred", 1), 2: ("s8", 1), 3: ("s16", 2), 4: ("s32", 4), 5: ("s64", 8), 6: ("u8", 1), 7: ("u16", 2),
    8: ("u32", 4), 9: ("u64", 8), 10: ("f16", 2), 11: ("f32", 4), 12: ("f64", 8), 13: ("tuple", 0), 15: ("c64", 8),
    16: ("bf16", 2), 17: ("token", 0), 18: ("c128", 16),
}  # fmt: skip
_NUMPY_NAMES = {"pred": "bool", "s32": "int32", "f32": "float32", "bf16": "bfloat16", "s64": "int64", "f64": "float64"}

# far above what a machine has
MOST_REPLICAS = 1 << 16
_ALIASES = ("input_output_alias", "buffer_donor")
# what it would mean is not known; it never was anything yet
_EMPTY = ("newer_98", "result_accuracy")
# where it came from, and what only a profiler or a partitioner reads
_STRIPPED_OF_MODULE = ("stack_frame_index", "frontend_attributes", "original_value_recovery_table", "id", *_ALIASES)
_STRIPPED_OF_INSTRUCTION = ("metadata", "frontend_attributes", "statistics_viz", "original_value", *_EMPTY)


def parse_module(proto: bytes) -> Any:
    """An HloModuleProto, fields as in `hlo_fields.toml`.

    Raises:
        CompileError: the bytes are no HLO module, or hold a field that is not described, which might be an id or a path
            that the canonical form has to know of.
    """
    from google.protobuf.message import DecodeError

    module = _module_class()()
    try:
        module.ParseFromString(proto)
    except DecodeError as error:
        raise CompileError(
            f"{len(proto)} bytes that are no HLO module proto ({error}); lower the module again"
        ) from error
    known = module.ByteSize()
    module.DiscardUnknownFields()
    if module.ByteSize() != known or not module.computations:
        raise CompileError(
            f"the HLO module {module.name!r} has {known - module.ByteSize()} bytes in fields that are not known here "
            f"and {len(module.computations)} computations; lower it with the pinned jaxlib, or describe the field in "
            "fluxkiln/compile/toolchains/neuron/hlo_fields.toml"
        )
    return module


@functools.cache
def _module_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field_type: Any = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="fluxkiln/hlo.proto", package="fluxkiln.hlo", syntax="proto3")
    messages = tomllib.loads(Path(__file__).with_name("hlo_fields.toml").read_text("utf-8"))
    for message, fields in messages.items():
        described = file.message_type.add(name=message)
        for field in fields.split(","):
            name, number, kind = field.split()
            label = field_type.LABEL_REPEATED if kind.endswith("*") else field_type.LABEL_OPTIONAL
            added = described.field.add(name=name, number=int(number), label=label)
            kind = kind.removesuffix("*")
            if kind in messages:
                added.type, added.type_name = field_type.TYPE_MESSAGE, f".fluxkiln.hlo.{kind}"
            else:
                added.type = getattr(field_type, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fluxkiln.hlo.Module"))


def write_module(module: Any) -> bytes:
    """The bytes of a parsed module: of equal ones the same."""
    proto: bytes = module.SerializeToString(deterministic=True)
    return proto


def entry_computation(module: Any) -> Any:
    """What the module runs; its other computations are called from there."""
    return next(one for one in module.computations if one.id == module.entry_computation_id)


def entry_parameters(proto: bytes) -> tuple[TensorSpec, ...]:
    """What a module takes, in order, named after their number; errors as `parse_module`."""
    shapes = parse_module(proto).host_program_shape.parameters
    return tuple(
        TensorSpec(f"p{index}", tuple(shape.dimensions), _NUMPY_NAMES.get(_element(shape), "unknown"))
        for index, shape in enumerate(shapes)
    )


def _element(shape: Any) -> str:
    return ELEMENTS.get(shape.element_type, ("unknown", 0))[0]


def canonicalise(proto: bytes) -> bytes:
    """The same program in canonical form: equal modules give equal bytes, in any process; applied twice, no change.

    Instructions and computations are numbered from 1 in program order, each over the whole module, and named after
    opcode and number; source information and attributes of the frontend are gone; replica groups are listed in the
    classic field `replica_groups` alone. What is computed stays as it is.

    Raises:
        CompileError: the bytes are no HLO module, refer to what is not there, or hold what is not described.
    """
    module = parse_module(proto)
    for field in _ALIASES:
        if getattr(module, field):
            raise CompileError(
                f"the module gives its inputs away ({field}), weights must outlive a run; lower it without donation"
            )
    _strip(module, _STRIPPED_OF_MODULE)
    module.name = "module"
    computations: dict[int, int] = {}
    count = 0
    for number, computation in enumerate(module.computations, start=1):
        computations[computation.id] = number
        instructions: dict[int, int] = {}
        for instruction in computation.instructions:
            count += 1
            instructions[instruction.id] = count
            _renumber(instruction, count, instructions, computations)
        computation.root_id = _new(instructions, computation.root_id, f"root of computation {number}")
        computation.id = number
        _name_parameters(computation.program_shape)
    entry = _new(computations, module.entry_computation_id, "entry computation")
    module.entry_computation_id = entry
    for computation in module.computations:
        computation.name = "main" if computation.id == entry else f"region_{computation.id}"
    module.entry_computation_name = "main"
    _name_parameters(module.host_program_shape)
    return write_module(module)


def listed_groups(instruction: Any) -> tuple[tuple[int, ...], ...]:
    """The replica groups of a collective, whichever field they are in; empty if it has none.

    Raises:
        CompileError: two fields give different groups, or the form of the list is not known.
    """
    classic = tuple(tuple(group.replica_ids) for group in instruction.replica_groups)
    if not instruction.HasField("collective_device_list"):
        return classic
    devices = instruction.collective_device_list
    newer = tuple(tuple(group.replica_ids) for group in devices.replica_groups)
    if devices.HasField("iota"):
        iota = devices.iota
        if iota.permutation and list(iota.permutation) != sorted(iota.permutation):
            raise CompileError(
                f"{instruction.name} has replica groups in the transposed form {list(iota.reshape_dimensions)} "
                f"{list(iota.permutation)}; only groups of successive replicas are known here, use one mesh axis"
            )
        size = iota.group_size
        if not (0 < size <= MOST_REPLICAS and 0 < iota.groups <= MOST_REPLICAS // size):
            raise CompileError(
                f"{instruction.name} has {iota.groups} replica groups of {size}, and {MOST_REPLICAS} replicas are the "
                "most; the proto is damaged: lower the module again"
            )
        newer = tuple(tuple(range(first, first + size)) for first in range(0, iota.groups * size, size))
    if classic and classic != newer:
        raise CompileError(
            f"{instruction.name} has replica groups {classic} in one field and {newer} in another; lower it again"
        )
    return newer


def _renumber(instruction: Any, number: int, instructions: dict[int, int], computations: dict[int, int]) -> None:
    for field in _EMPTY:
        if getattr(instruction, field):
            raise CompileError(
                f"{instruction.name} has {field} {getattr(instruction, field)!r}, which can only be dropped when it "
                "is empty; lower it with the pinned jaxlib"
            )
    _strip(instruction, _STRIPPED_OF_INSTRUCTION)
    what = f"instruction {number} ({instruction.opcode})"
    groups = listed_groups(instruction)
    instruction.ClearField("collective_device_list")
    instruction.ClearField("replica_groups")
    for group in groups:
        instruction.replica_groups.add(replica_ids=group)
    instruction.operand_ids[:] = [_new(instructions, old, f"operand of {what}") for old in instruction.operand_ids]
    instruction.called_computation_ids[:] = [
        _new(computations, old, f"computation called by {what}") for old in instruction.called_computation_ids
    ]
    instruction.id = number
    instruction.name = f"{instruction.opcode}.{number}"


def _strip(message: Any, fields: tuple[str, ...]) -> None:
    for field in fields:
        message.ClearField(field)


def _new(numbers: dict[int, int], old: int, what: str) -> int:
    if old not in numbers:
        raise CompileError(f"{what}: there is no id {old} before it; the proto is damaged, lower the module again")
    return numbers[old]


def _name_parameters(shape: Any) -> None:
    shape.parameter_names[:] = [f"p{index}" for index in range(len(shape.parameters))]
