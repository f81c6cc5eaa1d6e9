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
from fluxkiln.quantize.integer import THRESHOLD, integer_multipliers, pack_integer
from fluxkiln.types import WeightReader

_LOCATION = re.compile(r'^(#loc\d*) = loc\("(.*)"\)$', re.MULTILINE)
_OPERATION = re.compile(r'^ *%\w+ = "top\.(?P<name>\w+)"\(.*loc\((?P<loc>#loc\d*)\)$')
_PRODUCT = re.compile(
    r'"tpu\.MatMul"\(.*: \(tensor<[0-9x]+x(?P<input>[^>]*>)>, tensor<(?P<weight>[0-9x]+)xi8>.* -> tensor<[0-9x]+x'
    r"(?P<output>[^>]*>)> loc\((?P<loc>#loc\d*)\)$",
    re.MULTILINE,
)
_MULTIPLIERS = re.compile(r"\bmultipliers = \[[^\]]*\]")
# not one of the compiler's attributes for a product in 8 bits, which it takes all the same
_WIDE = "output_int16 = true, output_transpose = false"


def ask_for_integers(folder: Path, products: Collection[str], arithmetic: str) -> tuple[str, ...]:
    """Have `top.mlir` in `folder` compiled with these operations in 8 bits and all others in `arithmetic`.

    Every value has the same threshold: views of a value (Reshape, Permute) take their producer's, without a word.

    Returns:
        the arguments of `model_deploy` for it; the tables they name are written.
    """
    top = folder / "top.mlir"
    text = top.read_text()
    places, names, lines = dict(_LOCATION.findall(text)), [], []
    for line in text.splitlines():
        found = _OPERATION.match(line)
        if found and found["name"] not in ("Weight", "None"):
            names.append(places[found["loc"]])
            if names[-1] in products:
                line = line.replace("output_transpose = false", _WIDE, 1)
        lines.append(line)
    top.write_text("\n".join([*lines, ""]))
    (folder / "thresholds").write_text("".join(f"{name} {THRESHOLD} {-THRESHOLD} {THRESHOLD}\n" for name in names))
    (folder / "table").write_text("".join(f"{name} {arithmetic}\n" for name in names if name not in products))
    return ("--matmul_perchannel", "--calibration_table", "thresholds", "--quantize_table", "table")


def check_integers(text: str, expected: int, net: str) -> tuple[int, int]:
    """How many matmuls of a lowered graph are in 8 bits, and how many weights they have.

    Raises:
        CompileError: not as many as `expected`, or one hands on 8 bits: its products would be rounded to them.
    """
    products = list(_PRODUCT.finditer(text))
    narrow = sum("quant.uniform<i8" in one["input"] for one in products)
    wide = sum("quant.uniform<i16" in one["output"] for one in products)
    if not len(products) == narrow == wide == expected:
        raise CompileError(
            f"{net}: {narrow} of {expected} matmuls take 8 bits and {wide} of them hand on 16, W8A8 asks for all of "
            "both; pin TPU-MLIR 1.30.2"
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
