"""What HLO modules compute on the way: their values, and what float32 arithmetic makes of them.

Values are called after the instruction that makes them, `dot.57`: names of canonical modules are the same in every
process, and `widen` and `show_values` keep them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fluxkiln.compile.toolchains.neuron.hlo_module import ELEMENTS, entry_computation, parse_module, write_module
from fluxkiln.verify.findings import Operation

# what moves numbers and computes none; a `convert` computes where it narrows
_MOVES = frozenset({
    "broadcast", "concatenate", "constant", "copy", "iota", "pad", "parameter", "reshape", "slice", "transpose",
    "tuple",
})  # fmt: skip
_CODES = {name: code for code, (name, _) in ELEMENTS.items()}
_F32, _BF16, _TUPLE = _CODES["f32"], _CODES["bf16"], _CODES["tuple"]


def list_values(proto: bytes, inputs: Sequence[str], slots: Sequence[str]) -> tuple[Operation, ...]:
    """The operations of a module whose values are worth looking at, in program order.

    Left out is what moves numbers (reshape, slice), what is computed of weights or constants alone, and what is not
    floating point; an operation reads through these what lies behind them.

    Args:
        inputs, slots: names of the module's parameters, in order: activations, then weights.

    Raises:
        CompileError: the bytes are no HLO module.
    """
    entry = entry_computation(parse_module(proto))
    names = (*inputs, *slots)
    by_id = {instruction.id: instruction for instruction in entry.instructions}
    sources: dict[int, tuple[str, ...]] = {}
    held: dict[int, tuple[str, ...]] = {}
    found = []
    for instruction in entry.instructions:
        number = instruction.id
        if instruction.opcode == "parameter":
            name = names[instruction.parameter_number]
            given = instruction.parameter_number < len(inputs)
            sources[number], held[number] = ((name,), ()) if given else ((), (name,))
            continue
        read = tuple(dict.fromkeys(name for i in instruction.operand_ids for name in sources[i]))
        weights = tuple(dict.fromkeys(name for i in instruction.operand_ids for name in held[i]))
        if read and _computes(instruction, by_id):
            found.append(Operation(instruction.name, instruction.opcode, read, weights))
            sources[number], held[number] = (instruction.name,), ()
        else:
            sources[number], held[number] = read, weights
    return tuple(found)


def result_values(proto: bytes) -> tuple[str, ...]:
    """The values that the module returns, in order."""
    entry = entry_computation(parse_module(proto))
    by_id = {instruction.id: instruction for instruction in entry.instructions}
    return tuple(by_id[number].name for number in by_id[entry.root_id].operand_ids)


def show_values(proto: bytes, names: Sequence[str]) -> bytes:
    """The module with the values `names` as its outputs, in this order, in place of its own."""
    module = parse_module(proto)
    entry = entry_computation(module)
    by_name = {instruction.name: instruction for instruction in entry.instructions}
    fresh = 1 + _last_id(module)
    root = entry.instructions.add(name=f"tuple.{fresh}", opcode="tuple", id=fresh)
    root.shape.element_type = _TUPLE
    for name in names:
        root.operand_ids.append(by_name[name].id)
        root.shape.tuple_shapes.add().CopyFrom(by_name[name].shape)
    entry.root_id = root.id
    for program in (entry.program_shape, module.host_program_shape):
        program.result.CopyFrom(root.shape)
    return write_module(module)


def widen(proto: bytes) -> bytes:
    """The module with float32 wherever it has bfloat16, weights and activations included: nothing is rounded then."""
    module = parse_module(proto)
    fresh = _last_id(module)
    for computation in module.computations:
        instructions = []
        for instruction in computation.instructions:
            if instruction.opcode == "constant" and instruction.shape.element_type == _BF16:
                # its literal stays as it is: converted, under the name that its readers know
                fresh += 1
                wide = type(instruction)(name=instruction.name, opcode="convert", id=instruction.id)
                wide.shape.CopyFrom(instruction.shape)
                wide.operand_ids.append(fresh)
                _widen_shape(wide.shape)
                instruction.id, instruction.name = fresh, f"{instruction.name}.narrow"
                instructions += [instruction, wide]
            else:
                _widen_shape(instruction.shape)
                instructions.append(instruction)
        _replace_all(computation.instructions, instructions)
    programs = [module.host_program_shape, *(computation.program_shape for computation in module.computations)]
    for shape in (shape for program in programs for shape in (*program.parameters, program.result)):
        _widen_shape(shape)
    return write_module(module)


def recompute_values(proto: bytes, names: Sequence[str]) -> bytes:
    """The module that computes every one of the values `names` from the nearest others, which it is given.

    An error that came along with the operands is in them then, and what is left is the operation's own.

    Returns:
        A module whose parameters are those of `proto` and then the values; its outputs are the values anew.
    """
    module = parse_module(show_values(proto, names))
    entry = entry_computation(module)
    by_name = {instruction.name: instruction for instruction in entry.instructions}
    fresh, count = 1 + _last_id(module), len(module.host_program_shape.parameters)
    given, made = {}, []
    for number, name in enumerate(names):
        parameter = type(entry.instructions[0])(
            name=f"given.{name}", opcode="parameter", id=fresh + number, parameter_number=count + number
        )
        parameter.shape.CopyFrom(by_name[name].shape)
        given[by_name[name].id] = parameter.id
        made.append(parameter)
        for program in (entry.program_shape, module.host_program_shape):
            program.parameters.add().CopyFrom(parameter.shape)
            program.parameter_names.append(f"p{count + number}")
    for instruction in entry.instructions:
        if instruction.id != entry.root_id:
            instruction.operand_ids[:] = [given.get(i, i) for i in instruction.operand_ids]
    _replace_all(entry.instructions, [*made, *entry.instructions])
    return write_module(module)


def _computes(instruction: Any, by_id: Mapping[int, Any]) -> bool:
    element = instruction.shape.element_type
    if instruction.opcode in _MOVES or element not in (_F32, _BF16):
        return False
    narrows = element == _BF16 and by_id[instruction.operand_ids[0]].shape.element_type == _F32
    return bool(instruction.opcode != "convert" or narrows)


def _last_id(module: Any) -> int:
    return int(max(i.id for computation in module.computations for i in computation.instructions))


def _widen_shape(shape: Any) -> None:
    if shape.element_type == _BF16:
        shape.element_type = _F32
    for part in shape.tuple_shapes:
        _widen_shape(part)


def _replace_all(instructions: Any, wanted: Iterable[Any]) -> None:
    copies = [copy.deepcopy(instruction) for instruction in wanted]
    del instructions[:]
    instructions.extend(copies)
