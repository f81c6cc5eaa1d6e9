"""W8A8 for TPU-MLIR: what it is told, what it made of it, and how two compiles of a kind may differ.

A multiplier belongs to a shift, which is in the instructions, one byte for each matmul, and follows from the weights
that a kind was compiled with. Multipliers of other weights are made for the mould's shift.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
from fluxkiln.compile.toolchains.tpu_mlir.forms import MULTIPLIER, likely_shifts
from fluxkiln.errors import CompileError
from fluxkiln.quantize.integer import LEVELS, THRESHOLD, WIDE_LEVELS, integer_multipliers, pack_integer
from fluxkiln.types import WeightReader

# operations that hand on what they are given
_VIEWS = frozenset({"Permute", "Reshape", "Concat", "Slice"})
_LOCATION = re.compile(r'^(#loc\d*) = loc\("(.*)"\)$', re.MULTILINE)
_OPERATION = re.compile(r'^ *(?P<result>%\w+) = "top\.(?P<name>\w+)"\((?P<operands>.*?)\).*loc\((?P<loc>#loc\d*)\)$')
_PRODUCT = re.compile(
    r'"tpu\.MatMul"\(.*: \(tensor<[0-9x]+x(?P<input>[^>]*>)>, tensor<(?P<weight>[0-9x]+)xi8>.* -> tensor<[0-9x]+x'
    r"(?P<output>[^>]*>)> loc\((?P<loc>#loc\d*)\)$",
    re.MULTILINE,
)
_SCORES = re.compile(
    r'"tpu\.MatMul"\(.*: \(tensor<[0-9x]+x(?P<query>!quant[^>]*>)>, tensor<[0-9x]+x(?P<key>!quant[^>]*>)>.*'
    r"-> tensor<[0-9x]+x(?P<output>[^>]*>)> loc"
)
_SCALE = re.compile(r"!quant\.uniform<(?P<type>i\d+):\w+, (?P<scale>[0-9.E+-]+)>")
_MULTIPLIERS = re.compile(r"\bmultipliers = \[[^\]]*\]")
# not one of the compiler's attributes for a product in 8 bits, which it takes all the same
_WIDE = "output_int16 = true, output_transpose = false"


def ask_for_integers(
    folder: Path, products: Collection[str], scores: Collection[str], limit: int, arithmetic: str
) -> tuple[str, ...]:
    """Have `top.mlir` in `folder` compiled with these operations in 8 bits and all others in `arithmetic`.

    Every value has the same threshold: views of a value (Reshape, Permute) take their producer's, without a word. What
    `scores` multiply, and views of it, has `limit`; they themselves cannot be larger than its square.

    Returns:
        the arguments of `model_deploy` for it; the tables they name are written.
    """
    top = folder / "top.mlir"
    text = top.read_text()
    places, lines = dict(_LOCATION.findall(text)), []
    operations: dict[str, re.Match[str]] = {}
    for line in text.splitlines():
        found = _OPERATION.match(line)
        if found and found["name"] not in ("Weight", "None"):
            operations[found["result"]] = found
            if places[found["loc"]] in {*products, *scores}:
                line = line.replace("output_transpose = false", _WIDE, 1)
        lines.append(line)
    top.write_text("\n".join([*lines, ""]))
    names = {result: places[found["loc"]] for result, found in operations.items()}
    thresholds = dict.fromkeys(names, THRESHOLD)
    pending: list[str] = []
    for result in (result for result, name in names.items() if name in scores):
        thresholds[result] = float(limit**2)
        pending += operations[result]["operands"].split(", ")[:2]
    while pending:
        result = pending.pop()
        thresholds[result] = float(limit)
        if operations[result]["name"] in _VIEWS:
            pending += [one for one in operations[result]["operands"].split(", ") if one in operations]
    (folder / "thresholds").write_text(
        "".join(f"{names[result]} {most} {-most} {most}\n" for result, most in thresholds.items())
    )
    coded = {*products, *scores}
    (folder / "table").write_text("".join(f"{name} {arithmetic}\n" for name in names.values() if name not in coded))
    return ("--matmul_perchannel", "--calibration_table", "thresholds", "--quantize_table", "table")


def check_integers(text: str, expected: int, scores: int, limit: int, net: str) -> tuple[int, int]:
    """How many matmuls of a lowered graph are in 8 bits, and how many weights they have.

    Args:
        scores: how many products of queries and keys are to be so as well, of numbers up to `limit`.

    Raises:
        CompileError: not as many as `expected`, or one hands on 8 bits: its products would be rounded to them; or a
            scale is another than was asked for, as a view has it that did not get its producer's threshold.
    """
    products, attended = list(_PRODUCT.finditer(text)), list(_SCORES.finditer(text))
    narrow = sum("quant.uniform<i8" in one["input"] for one in products)
    wide = sum("quant.uniform<i16" in one["output"] for one in products)
    if not len(products) == narrow == wide == expected:
        raise CompileError(
            f"{net}: {narrow} of {expected} matmuls take 8 bits and {wide} of them hand on 16, W8A8 asks for all of "
            "both; pin TPU-MLIR 1.30.2"
        )
    if len(attended) != scores:
        raise CompileError(
            f"{net}: {len(attended)} of {scores} products of queries and keys are in 8 bits; pin TPU-MLIR 1.30.2"
        )
    for one, what, most, levels in (
        *((one, "input", THRESHOLD, LEVELS) for one in products),
        *((one, "output", THRESHOLD, WIDE_LEVELS) for one in products),
        *((one, what, float(limit), LEVELS) for one in attended for what in ("query", "key")),
        *((one, "output", float(limit**2), WIDE_LEVELS) for one in attended),
    ):
        scale = _SCALE.search(one[what])
        if scale is None or not math.isclose(float(scale["scale"]), most / levels, rel_tol=1e-6):
            raise CompileError(
                f"{net}: the {what} of a matmul has {one[what]}, a scale of {most / levels:.7g} was asked for; every "
                "view of a value wants its producer's threshold (ask_for_integers)"
            )
    return expected, sum(math.prod(map(int, one["weight"].split("x"))) for one in products)


def set_multipliers(text: str, weights: Mapping[str, NDArray[Any]]) -> str:
    """A lowered graph with the multipliers of a weight file: the interpreter takes them from its text.

    Raises:
        CompileError: the file has none for a product.
    """
    places = dict(_LOCATION.findall(text))

    def own(found: re.Match[str]) -> str:
        name = f"{places[found['loc']]}_multi_int32"
        if name not in weights:
            raise CompileError(f"the weight file has no {name}; pin TPU-MLIR 1.30.2")
        return _MULTIPLIERS.sub(f"multipliers = {weights[name].tolist()}", found[0], count=1)

    return _PRODUCT.sub(own, text)


def with_shifts_of(
    bmodel: Path, start: int, coefficients: CoefficientMap, read_weight: WeightReader
) -> tuple[CoefficientMap, list[tuple[int, int]]]:
    """A mould's map for the shifts of another compile with these weights, and each matmul's shift in both.

    Args:
        start: of the other's coefficients.

    Raises:
        CompileError: its multipliers are not those of these weights, whatever the shift.
    """
    placements, shifts = [], []
    for placement in coefficients.binary:
        form = placement.form
        if form.name == MULTIPLIER:
            weight = read_weight(form.slot)
            stored = np.fromfile(bmodel, np.int32, len(weight), offset=start + placement.offset)
            scales = pack_integer(weight).scales_O
            fitting = (
                shift
                for shift in likely_shifts(scales)
                if np.array_equal(integer_multipliers(scales, shift, form.slot), stored)
            )
            if (shift := next(fitting, None)) is None:
                raise CompileError(f"the multipliers of {form.slot} are not those of its weights; pin TPU-MLIR 1.30.2")
            shifts.append((form.shift, shift))
            placement = replace(placement, form=replace(form, shift=shift))
        placements.append(placement)
    return replace(coefficients, binary=tuple(placements)), shifts


def same_but_for_shifts(mould: Path, other: Path, shifts: Collection[tuple[int, int]]) -> bool:
    """Whether two shells are the same bytes, but for one of each matmul whose shifts differ: minus the shift."""
    ours, theirs = (np.fromfile(path, np.uint8) for path in (mould, other))
    if ours.size != theirs.size:
        return False
    places = np.flatnonzero(ours != theirs)
    found = sorted(zip(ours[places].tolist(), theirs[places].tolist(), strict=True))
    return found == sorted((-one % 256, -other % 256) for one, other in shifts if one != other)
