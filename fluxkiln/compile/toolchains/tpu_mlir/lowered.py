"""The compiler's lowered graph (`*_tpu.mlir`) in a form that its interpreter runs in little memory.

As it is, a single block of FLUX.1 at 1024x1024 takes the interpreter 9 GB: every activation is held in float32 until
the end, the scores of attention twice. The interpreter can put activations in one another's place (mode `reused_mem`),
but then gives inputs the places of one another too, because they are declared between the operations: they go to the
top here. And attention is computed for some heads at a time. Neither changes a bit of the result.

Source: TPU-MLIR 1.30.2, the text that `model_deploy --debug` leaves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fluxkiln.compile.onnx.runner import MOST_SCORES
from fluxkiln.errors import CompileError

_OPERATION = re.compile(
    r'\s*(?P<result>%\w+) = "(?P<name>[\w.]+)"\((?P<operands>.*?)\) (?P<attributes>\{.*\} )?'
    r": \((?P<types>.*)\) -> (?P<type>.+?) loc\((?P<loc>.+)\)"
)
_TENSOR = re.compile(r"tensor<([0-9x]+)x(\w+)>")
_FUNCTION = "func.func @main("


@dataclass(frozen=True, slots=True)
class _Operation:
    line: int
    result: str
    name: str
    operands: tuple[str, ...]
    attributes: str
    type: str
    loc: str

    @property
    def shape(self) -> tuple[int, ...]:
        found = _TENSOR.fullmatch(self.type)
        return tuple(int(size) for size in found[1].split("x")) if found else ()


def lean_graph(text: str, most_scores: int = MOST_SCORES) -> str:
    """The graph with its inputs declared first and attention in groups of heads.

    Args:
        text: a `*_tpu.mlir`.
        most_scores: elements of one group's scores, where the number of heads allows.

    Raises:
        CompileError: it is no such graph.
    """
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if _FUNCTION in line), None)
    if start is None:
        raise CompileError("the lowered graph has no function main; pin TPU-MLIR 1.30.2")
    operations = [operation for index, line in enumerate(lines) if (operation := _parse(index, line)) is not None]
    replaced: dict[int, list[str]] = {}
    for softmax in operations:
        if softmax.name == "tpu.Softmax":
            replaced |= _by_heads(operations, softmax, most_scores)
    inputs = [operation.line for operation in operations if operation.name == "top.Input"]
    body = [
        new
        for index, line in enumerate(lines[start + 1 :], start + 1)
        if index not in inputs
        for new in replaced.get(index, [line])
    ]
    return "\n".join([*lines[: start + 1], *(lines[index] for index in inputs), *body, ""])


def _parse(index: int, line: str) -> _Operation | None:
    found = _OPERATION.fullmatch(line)
    if found is None:
        return None
    operands = tuple(name.strip() for name in found["operands"].split(",")) if found["operands"] else ()
    return _Operation(
        index, found["result"], found["name"], operands, found["attributes"] or "", found["type"], found["loc"]
    )


def _by_heads(operations: list[_Operation], softmax: _Operation, most_scores: int) -> dict[int, list[str]]:
    """Line -> what stands there instead, for softmax(query @ key) @ value with too many scores; else nothing."""
    makers = {operation.result: operation for operation in operations}
    readers = [operation for operation in operations if softmax.result in operation.operands]
    scores = makers.get(softmax.operands[0])
    if scores is None or scores.name != "tpu.MatMul" or len(readers) != 1 or readers[0].name != "tpu.MatMul":
        return {}
    (attended,) = readers
    only_here = sum(operation.operands.count(scores.result) for operation in operations) == 1
    if not only_here or attended.operands[0] != softmax.result or len(scores.shape) != 4 or scores.shape[0] != 1:
        return {}
    heads, size = scores.shape[1], scores.shape[1] * scores.shape[2] * scores.shape[3]
    groups = next((count for count in range(1, heads) if heads % count == 0 and size <= count * most_scores), heads)
    if groups == 1:
        return {}
    lines: list[str] = []
    parts: list[tuple[str, str]] = []
    query, key, value = (makers[name] for name in (*scores.operands[:2], attended.operands[1]))
    for group in range(groups):
        span = slice(group * heads // groups, (group + 1) * heads // groups)
        tag = f"%heads{softmax.result[1:]}_{group}"
        cut = [_slice(operation, span, tag, lines) for operation in (query, key, value)]
        for operation, operands in ((scores, cut[:2]), (softmax, []), (attended, cut[2:])):
            operands = operands if operation is scores else [parts.pop(), *operands]
            parts.append(_emit(operation, operands, span, tag, lines))
    names = ", ".join(name for name, _ in parts)
    types = ", ".join(type_ for _, type_ in parts)
    lines.append(
        f'    {attended.result} = "tpu.Concat"({names}) {{axis = 1 : si32, do_relu = false, only_merge = false, '
        f"relu_limit = -1.000000e+00 : f64}} : ({types}) -> {attended.type} loc({attended.loc})"
    )
    return {scores.line: [], softmax.line: [], attended.line: lines}


def _narrow(type_: str, heads: int) -> str:
    """A tensor's type with this many heads, its second axis."""
    first, _, *rest = type_.removeprefix("tensor<").split("x")
    return "tensor<" + "x".join([first, str(heads), *rest])


def _slice(operation: _Operation, span: slice, tag: str, lines: list[str]) -> tuple[str, str]:
    """Add the slice of some heads of a tensor to `lines`; returns its name and type."""
    name, type_ = f"{tag}_of_{operation.result[1:]}", _narrow(operation.type, span.stop - span.start)
    ends = [1, span.stop, *operation.shape[2:]]
    lines.append(
        f'    {name} = "tpu.Slice"({operation.result}, %0, %0, %0, %0) {{axes = [], ends = {ends}, '
        f"hasparamConvert_axes = [1], offset = [0, {span.start}, 0, 0], steps = [1, 1, 1, 1]}} : "
        f'({operation.type}, none, none, none, none) -> {type_} loc("{name[1:]}")'
    )
    return name, type_


def _emit(
    operation: _Operation, operands: list[tuple[str, str]], span: slice, tag: str, lines: list[str]
) -> tuple[str, str]:
    """Add `operation` for some heads to `lines`; returns its result's name and type."""
    name, type_ = f"{tag}_{operation.result[1:]}", _narrow(operation.type, span.stop - span.start)
    rest = operation.operands[len(operands) :]
    if any(operand != "%0" for operand in rest):
        raise CompileError(f"{operation.name} has operands {operation.operands}; pin TPU-MLIR 1.30.2")
    names = ", ".join([*(operand for operand, _ in operands), *rest])
    types = ", ".join([*(kind for _, kind in operands), *["none"] * len(rest)])
    lines.append(
        f'    {name} = "{operation.name}"({names}) {operation.attributes}: ({types}) -> {type_} loc("{name[1:]}")'
    )
    return name, type_
