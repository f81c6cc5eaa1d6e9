"""One form for equal HLO modules, which older readers of the proto take too.

jaxlib numbers instructions beyond 32 bits, on which a Neuron compiler was seen to end, names them after Python
functions, records source files, and writes replica groups into a field that older readers do not know.
"""

from __future__ import annotations

from typing import Any

from fluxkiln.compile.toolchains.neuron.hlo_proto import parse_module
from fluxkiln.errors import CompileError

_MODULE_NAME = "module"
_ALIASES = ("input_output_alias", "buffer_donor")
# what it would mean is not known; it never was anything yet
_EMPTY = ("newer_98", "result_accuracy")
# where it came from, and what only a profiler or a partitioner reads
_STRIPPED = {
    "module": ("stack_frame_index", "frontend_attributes", "original_value_recovery_table", "id", *_ALIASES),
    "instruction": ("metadata", "frontend_attributes", "statistics_viz", "original_value", *_EMPTY),
}


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
    _strip(module, "module")
    module.name = _MODULE_NAME
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
    canonical: bytes = module.SerializeToString(deterministic=True)
    return canonical


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
    _strip(instruction, "instruction")
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


def _strip(message: Any, kind: str) -> None:
    for field in _STRIPPED[kind]:
        message.ClearField(field)


def _new(numbers: dict[int, int], old: int, what: str) -> int:
    if old not in numbers:
        raise CompileError(f"{what}: there is no id {old} before it; the proto is damaged, lower the module again")
    return numbers[old]


def _name_parameters(shape: Any) -> None:
    shape.parameter_names[:] = [f"p{index}" for index in range(len(shape.parameters))]
