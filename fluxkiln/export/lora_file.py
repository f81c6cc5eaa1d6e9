"""A LoRA's file, of any of the forms that people have, as what it does to which tensor of a checkpoint.

The matrices stay in the file (`export.change`) after one look for NaN and Inf.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fluxkiln.documents import SMALL, check_schema, read_object
from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.change import Column, Delta, Hadamard, Kronecker, LoraTensor, LowRank, Piece
from fluxkiln.export.checkpoint import FLOAT_DTYPES, Checkpoint, matrix_shape, read_blocks
from fluxkiln.export.lora_places import LORA_ROLES, LoraLayer, place_layers
from fluxkiln.export.safetensors_header import read_header
from fluxkiln.files import file_state, open_regular
from fluxkiln.types import TensorRef

METADATA_KEY = "lora_adapter_metadata"
# What a matrix may be stored as; BOOL and whole numbers are none.
_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
MOST_PATTERNS = 2000
_ELSEWHERE = "fuse it with the tool that made it and give that folder as the model"
# What a tensor's name tells that nothing here computes.
_REFUSED = (
    (r"\.(oft|boft|glora|ia3)_", "is an adapter of another kind; LoRA, DoRA, LoHa and LoKr are read"),
    (r"lora_mid|hada_t\d|lokr_t2", "has factors of convolutions, cut in three; pairs of matrices are read"),
    (r"\.diff(_b)?$", "has whole differences; only what is made of factors is read"),
)
# Names of layers, with what PEFT's patterns have in them. No groups and one repetition: nothing that takes long.
_PATTERN = re.compile(r"(?:[\w.^$|-]|\\[.d-]|\\d\+){1,200}")
_PEFT, _KOHYA = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
_NORM = re.compile(r"\.norm_(added_)?[qk]\.weight$")


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA as it was read; `sha256` is of the file's bytes. `missing`: its layers that the checkpoint has not."""

    file: Path
    sha256: str
    pieces: tuple[Piece, ...]
    missing: tuple[str, ...] = ()


def digest_lora(file: Path) -> str:
    """sha256 of the file's bytes, read once as long as it stays the same; UsageError when there is no such file."""
    try:
        return _digest(file.absolute(), tuple(file_state(file)))
    except OSError as error:
        raise UsageError(
            f"--lora {file}: {error.strerror}; give a LoRA's .safetensors file, as FILE or FILE:STRENGTH"
        ) from error


@lru_cache(maxsize=256)
def _digest(file: Path, state: tuple[int, ...]) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_lora(file: Path, checkpoint: Checkpoint) -> LoraFile:
    """Read and check a LoRA file, and find the tensors of a checkpoint that it changes.

    Raises:
        UsageError: no such file.
        CheckpointError: no safetensors file, no LoRA in it, a form that is not computed here, a NaN or Inf; no layer
            that the checkpoint has, or one of another shape.
    """
    sha256 = digest_lora(file)
    header = read_header(file)
    for pattern, what in _REFUSED:
        if hits := [name for name in header if re.search(pattern, name)]:
            raise CheckpointError(f"{file} {what} ({_some(hits)}); {_ELSEWHERE}")
    state = file_state(file)
    _check_tensors(file, header)
    layers = list(_layers(file, {name: LoraTensor(ref, state) for name, ref in header.items()}))
    text, where = _metadata(file), f"{METADATA_KEY} of {file}"
    told = {name: read_metadata(text, where, name) for name in checkpoint.model.components} if text else {}
    if any(told.values()) and any("alpha" in layer.tensors for layer in layers):
        raise CheckpointError(
            f"{file} gives alphas twice, as tensors and in its metadata; save the LoRA again with either"
        )
    pieces, missing = [], []
    for layer, places in zip(layers, place_layers(file, layers, checkpoint), strict=True):
        there = [place for place in places if place[1] in checkpoint.tensors[place[0]]]
        missing += [] if there else [layer.name]
        for component, tensor, rows in there:
            scale = _scale(file, layer, tensor.rpartition(".")[0], told.get(component, {}))
            # norms as diffusers has those of a control LoRA: whatever the strength
            replaces = bool(layer.whole) and not layer.whole.endswith(".bias")
            magnitude = None if layer.whole else layer.tensors.get("magnitude")
            pieces.append(Piece(component, tensor, layer.delta, rows, scale, replaces, magnitude))
            _check_fits(file, pieces[-1], checkpoint)
    if not pieces:
        raise _no_match(file, missing, checkpoint)
    return LoraFile(file, sha256, tuple(sorted(pieces, key=lambda one: (one.component, one.tensor))), tuple(missing))


def _no_match(file: Path, missing: list[str], checkpoint: Checkpoint) -> CheckpointError:
    names = [name.removesuffix(".weight") for refs in checkpoint.tensors.values() for name in refs]
    wanted = missing[0].removeprefix(f"{checkpoint.model.adapted}.")
    near = ", ".join(difflib.get_close_matches(wanted, names, 2))
    return CheckpointError(
        f"{file} changes nothing: none of its {len(missing)} layers ({_some(missing)}) is in the "
        f"{', '.join(checkpoint.tensors)} of {checkpoint.name}{f', near are {near}' if near else ''}; it is for "
        "another model, or for components that are not built"
    )


def _check_tensors(file: Path, header: Mapping[str, TensorRef]) -> None:
    """Every tensor holds real numbers, at least one, and all of them finite."""
    import numpy as np

    for name, ref in header.items():
        if ref.dtype not in _DTYPES:
            raise CheckpointError(
                f"{name} in {file} is {ref.dtype}, a LoRA's tensors are {', '.join(_DTYPES)}; save it unquantized"
            )
        if not ref.nbytes:
            raise CheckpointError(f"{name} in {file} has the shape {list(ref.shape)}, which is empty; save it again")
        if not all(np.isfinite(block.astype(np.float32)).all() for block in read_blocks(ref)):
            raise CheckpointError(
                f"{name} in {file} has a NaN or Inf, weights must be finite; its training diverged: use another"
            )


def _layers(file: Path, factors: Mapping[str, LoraTensor]) -> Iterator[LoraLayer]:
    found: dict[str, dict[str, LoraTensor]] = {}
    ends: dict[str, dict[str, str]] = {}
    for name, factor in factors.items():
        end = next((end for end in LORA_ROLES if name.endswith(end)), "")
        layer = name.removesuffix(end)
        if end == ".alpha":
            layer = layer.split(".lora_")[0]
        found.setdefault(layer, {})[LORA_ROLES.get(end, "whole")] = factor
        ends.setdefault(layer, {})[LORA_ROLES.get(end, "whole")] = end
    if not any({"down", "hada_w1_a", "lokr_w2", "lokr_w2_a"} & tensors.keys() for tensors in found.values()):
        raise CheckpointError(
            f"{file} holds no LoRA: none of its {len(factors)} tensors ({_some(list(factors))}) is one of a low-rank "
            "pair, lora_A.weight or lora_down.weight say; give the file that a LoRA trainer wrote"
        )
    for name, tensors in found.items():
        if "whole" in tensors or "bias" in tensors:
            whole = name if "whole" in tensors else f"{name}.lora_B.bias"
            column = Column(tensors.get("whole") or tensors["bias"])
            yield LoraLayer(name, tensors, column, _PEFT, whole)
        if tensors.keys() - {"whole", "bias"}:
            delta = _delta(file, name, tensors)
            plain = isinstance(delta, LowRank)
            yield LoraLayer(name, tensors, delta, (ends[name]["down"], ends[name]["up"]) if plain else _KOHYA)


def _delta(file: Path, layer: str, tensors: Mapping[str, LoraTensor]) -> Delta:
    def half(name: str) -> LoraTensor:
        if name not in tensors:
            raise CheckpointError(
                f"{file} has {', '.join(tensors)} of {layer} without its {name}, which is no whole LoRA; fetch it again"
            )
        return tensors[name]

    def matrix(name: str) -> LoraTensor | LowRank:
        return tensors[name] if name in tensors else LowRank(half(f"{name}_a"), half(f"{name}_b"))

    delta: Delta
    if any(name.startswith("hada") for name in tensors):
        one, two = (LowRank(half(f"hada_w{n}_a"), half(f"hada_w{n}_b")) for n in (1, 2))
        delta, pairs = Hadamard(one, two), [one, two]
    elif any(name.startswith("lokr") for name in tensors):
        first, second = matrix("lokr_w1"), matrix("lokr_w2")
        delta, pairs = Kronecker(first, second), [one for one in (first, second) if isinstance(one, LowRank)]
    else:
        delta = LowRank(half("up"), half("down"))
        pairs = [delta]
    shapes = [factor.shape for name, factor in tensors.items() if name not in ("alpha", "magnitude", "bias")]
    if (
        any(len(shape) != 2 for shape in shapes)
        or any(one.up.shape[1] != one.down.shape[0] for one in pairs)
        or (isinstance(delta, Hadamard) and delta.first.shape != delta.second.shape)
    ):
        raise CheckpointError(
            f"{file} has {', '.join(str(list(shape)) for shape in shapes)} for {layer}; a pair is [rank, in] and "
            "[out, rank]: it is damaged or for another model"
        )
    numbers = sum(math.prod(shape) for shape in shapes)
    if numbers > 2 * len(pairs or shapes) * math.prod(delta.shape):
        raise CheckpointError(
            f"{file} has {numbers} numbers for {layer}, more than twice as many as what it changes; no LoRA is that "
            "large: give another"
        )
    _check_magnitude(file, layer, delta, tensors.get("magnitude"))
    return delta


def _check_magnitude(file: Path, layer: str, delta: Delta, magnitude: LoraTensor | None) -> None:
    height = delta.shape[0]
    if magnitude is not None and magnitude.shape not in ((height,), (height, 1)):
        raise CheckpointError(
            f"{file} is a DoRA with magnitudes {list(magnitude.shape)} for {layer}, whose rows are {height}; "
            f"lengths of columns are not read, only those of rows: {_ELSEWHERE}"
        )


def _check_fits(file: Path, piece: Piece, checkpoint: Checkpoint) -> None:
    ref = checkpoint.tensors[piece.component][piece.tensor]
    if piece.replaces and not _NORM.search(piece.tensor):
        raise CheckpointError(
            f"{file} has {piece.tensor}, which is no half of a low-rank pair with its other half beside it; only what "
            f"is made of factors is read: {_ELSEWHERE}"
        )
    if matrix_shape(ref) != piece.shape:
        raise CheckpointError(
            f"{file} changes {piece.tensor} as {list(piece.shape)}, in {checkpoint.name} it is {list(ref.shape)}; "
            "it is for another model, or a control LoRA, which needs wider inputs than FluxPipeline has"
        )
    if ref.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{piece.tensor} of {checkpoint.name} is stored as {ref.dtype}, LoRAs change "
            f"{', '.join(FLOAT_DTYPES)}; give a checkpoint in BF16"
        )


def _metadata(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(str(file), framework="np") as stream:
        if not any(".lora_A." in name for name in stream.keys()):  # noqa: SIM118
            return ""  # PEFT's; the other forms have their alphas in tensors
        return str((stream.metadata() or {}).get(METADATA_KEY, ""))


def read_metadata(text: str, where: str, component: str = "transformer") -> dict[str, Any]:
    """What PEFT wrote about a LoRA for a component, by PEFT's own names; CheckpointError where it is not legal."""
    from fluxkiln.export.lora_schema import PeftConfig

    remedy = "save the LoRA again"
    data = text.encode(errors="surrogatepass")
    found = read_object(data, where, error=CheckpointError, remedy=remedy, limits=SMALL)
    own = {key for key in found if key.startswith(f"{component}.") or "." not in key}
    config = {key.removeprefix(f"{component}."): found[key] for key in own}
    check_schema(config, PeftConfig, where, error=CheckpointError, remedy=remedy)
    patterns = config.get("alpha_pattern") or {}
    if len(patterns) > MOST_PATTERNS:
        raise CheckpointError(f"{where} has {len(patterns)} patterns, {MOST_PATTERNS} are the most; {remedy}")
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise CheckpointError(
                f"{where} has the pattern {pattern[:80]!r}; names of layers are taken, joined by | at most: {remedy}"
            )
    return config


def _scale(file: Path, layer: LoraLayer, target: str, metadata: Mapping[str, Any]) -> float:
    """alpha / rank, 1 without an alpha; or as PEFT's own config says.

    Source: PEFT, LoraLayer.update_layer and get_pattern_key; its patterns are regular expressions for the end of a
    layer's name. A LoKr of two whole matrices has no rank, and LyCORIS no scale then.
    """
    ranks = [layer.tensors[name].shape[0] for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
             if name in layer.tensors]  # fmt: skip
    if not ranks:
        return 1.0
    rank = ranks[0]
    if not metadata:
        return (_alpha(file, layer) / rank) if "alpha" in layer.tensors else 1.0
    alpha = metadata.get("lora_alpha", rank)
    for pattern, value in (metadata.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if metadata.get("use_rslora") else rank)


def _alpha(file: Path, layer: LoraLayer) -> float:
    values = layer.tensors["alpha"]().reshape(-1)
    if len(values) != 1:
        raise CheckpointError(
            f"{file} has {len(values)} numbers as the alpha of {layer.name}, an alpha is one; it is damaged, or no "
            "LoRA of this kind"
        )
    return float(values[0])


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
