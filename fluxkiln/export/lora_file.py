"""A LoRA for a transformer, read from any of the forms that people have, as what it adds to which tensor.

Names are converted by diffusers' own converters, as the model calls them. Where these leave
something out without a word, the file is refused here: a LoRA counts as a whole or not at all.

Shapes: O = out features, I = in features, R = rank.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.documents import SMALL, check_schema, read_object
from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.safetensors_header import read_header
from fluxkiln.files import open_regular
from fluxkiln.patches.model import Model
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

METADATA_KEY = "lora_adapter_metadata"
# What a matrix may be stored as; BOOL and whole numbers are none.
_DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
MOST_PATTERNS = 2000
_ELSEWHERE = "fuse it with the tool that made it and give that folder as the model"
# What a tensor's name tells that the file has besides low-rank pairs for the transformer.
_REFUSED = (
    (r"dora_scale|lora_magnitude_vector", "is a DoRA, which has magnitudes of its own; only LoRA is fused"),
    (r"\.(lokr|hada|oft|glora)_|lora_mid", "is a LyCORIS adapter, not a LoRA of two matrices; only LoRA is fused"),
    (r"^(lora_)?te\d?_|^text_encoder", "has layers for the text encoders; only the transformer's are fused"),
    (r"\.diff(_b)?$", "has whole differences besides low-rank pairs; only pairs are fused"),
)  # fmt: skip
# Names of layers, with what PEFT's patterns have in them. No groups and one repetition: nothing that takes long.
_PATTERN = re.compile(r"(?:[\w.^$|-]|\\[.d-]|\\d\+){1,200}")
_DOWN = re.compile(r"\.(lora_A|lora_down|down)\.weight$")
_UP = re.compile(r"\.(lora_B|lora_up|up)\.weight$")


@dataclass(frozen=True, slots=True)
class Piece:
    """What is added to one tensor: `scale` * up_OR @ down_RI in float32; put in its place instead if it `replaces`.

    A bias and a norm's weight count as [O, 1].
    """

    tensor: str
    up_OR: Tensor
    down_RI: Tensor
    scale: float = 1.0
    replaces: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.up_OR.shape[0], self.down_RI.shape[1]


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA as it was read; `sha256` is of the file's bytes."""

    file: Path
    sha256: str
    pieces: tuple[Piece, ...]


def digest_lora(file: Path) -> str:
    """sha256 of the file's bytes, read once as long as it stays the same; UsageError when there is no such file."""
    try:
        found = file.stat()
        state = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
        return _digest(file.absolute(), state)
    except OSError as error:
        raise UsageError(
            f"--lora {file}: {error.strerror}; give a LoRA's .safetensors file, as FILE or FILE:STRENGTH"
        ) from error


@lru_cache(maxsize=256)
def _digest(file: Path, state: tuple[int, ...]) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_lora(file: Path, model: Model, most: int | None = None) -> LoraFile:
    """Read, convert and check a LoRA file; tensors become float32.

    Memory: twice 4 bytes for each of the file's numbers, at most.

    Args:
        most: how many numbers it may have; a low-rank pair has no more than twice what its matrix has.

    Raises:
        UsageError: no such file.
        CheckpointError: no safetensors file, no LoRA in it, something besides pairs for the model's transformer, names
            that diffusers cannot convert, a NaN or Inf.
    """
    sha256 = digest_lora(file)
    header = read_header(file)
    names = list(header)
    for pattern, what in _REFUSED:
        hits = [name for name in names if re.search(pattern, name)]
        if hits:
            raise CheckpointError(f"{file} {what} ({_some(hits)}); {_ELSEWHERE}")
    if not any(map(_DOWN.search, names)):
        raise CheckpointError(
            f"{file} holds no LoRA: none of its {len(names)} tensors ({_some(names)}) is one of a low-rank pair, "
            "lora_A.weight or lora_down.weight say; give the file that a LoRA trainer wrote"
        )
    _check_tensors(file, header, most)
    tensors, metadata = _load(file)
    if not any(".lora_A." in name for name in names):
        metadata = {}  # PEFT's; the other forms have their alphas in tensors
    rows = sum(tensor.shape[0] for name, tensor in tensors.items() if _UP.search(name) and tensor.ndim)
    converted, alphas = _convert(file, model, tensors)
    placed = sum(tensor.shape[0] for name, tensor in converted.items() if _UP.search(name) and tensor.ndim)
    if placed != rows:
        raise CheckpointError(
            f"{file} has layers with {rows} output rows, and diffusers' converter finds a place for {placed} of them; "
            f"it mixes forms or has layers that {model.title} has not: {_ELSEWHERE}"
        )
    pieces = _pieces(file, converted, alphas, metadata)
    return LoraFile(file, sha256, tuple(sorted(pieces, key=lambda piece: piece.tensor)))


def _check_tensors(file: Path, header: Mapping[str, TensorRef], most: int | None) -> None:
    """What the header alone tells: every tensor holds real numbers, at least one, and all of them not too many."""
    for name, ref in header.items():
        if ref.dtype not in _DTYPES:
            raise CheckpointError(
                f"{name} in {file} is {ref.dtype}, a LoRA's tensors are {', '.join(_DTYPES)}; save it unquantized"
            )
        if not ref.nbytes:
            raise CheckpointError(f"{name} in {file} has the shape {list(ref.shape)}, which is empty; save it again")
    numbers = sum(math.prod(ref.shape) for ref in header.values())
    if most is not None and numbers > most:
        raise CheckpointError(
            f"{file} has {numbers} numbers, more than twice as many as what it changes; it is for a larger model: "
            "give one for this"
        )


def _load(file: Path) -> tuple[Tensors, dict[str, Any]]:
    """Every tensor in float32, and what PEFT wrote about ranks and alphas."""
    import torch
    from safetensors import safe_open

    tensors = {}
    with safe_open(str(file), framework="pt") as stream:
        told = (stream.metadata() or {}).get(METADATA_KEY)
        for name in stream.keys():  # noqa: SIM118
            tensors[name] = stream.get_tensor(name).to(torch.float32)
            if not torch.isfinite(tensors[name]).all():
                raise CheckpointError(
                    f"{name} in {file} has a NaN or Inf, weights must be finite; its training diverged: use another"
                )
    return tensors, read_metadata(told or "{}", f"{METADATA_KEY} of {file}")


def read_metadata(text: str, where: str) -> dict[str, Any]:
    """What PEFT wrote about a LoRA for the transformer, by PEFT's own names; CheckpointError where it is not legal."""
    from fluxkiln.export.lora_schema import PeftConfig

    remedy = "save the LoRA again"
    data = text.encode(errors="surrogatepass")
    found = read_object(data, where, error=CheckpointError, remedy=remedy, limits=SMALL)
    config = {key.removeprefix("transformer."): value for key, value in found.items()}
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


def _convert(file: Path, model: Model, tensors: Tensors) -> tuple[Tensors, Mapping[str, Any]]:
    try:
        return model.convert_lora(tensors)
    except Exception as error:  # whatever the converters raise about what they do not know
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file} has layers that diffusers' converter cannot place in {model.title} ({type(error).__name__}: "
            f"{reason}); it is for another model or not whole: give the file as its trainer wrote it for {model.title}"
        ) from error


def _pieces(file: Path, converted: Tensors, alphas: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[Piece]:
    import torch

    names = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
    told = {_layer_of_alpha(name): _number(file, name, alpha) for name, alpha in alphas.items()}
    # One of the converters hands them through.
    own = [name for name in names if name.endswith(".alpha")]
    told |= {_layer_of_alpha(name): _number(file, name, names.pop(name)) for name in own}
    if told and metadata:
        raise CheckpointError(
            f"{file} gives alphas twice, as tensors and in its metadata; save the LoRA again with either"
        )
    pieces = []
    one = torch.ones(1, 1)
    for name in sorted(names):
        layer, _, role = name.rpartition(".lora_")
        if role == "A.weight":
            up = names.get(f"{layer}.lora_B.weight")
            pieces.append(_pair(file, layer, names[name], up, told, metadata))
        elif role == "B.weight" and f"{layer}.lora_A.weight" in names:
            continue
        elif role == "B.bias" and f"{layer}.lora_A.weight" in names:
            scale = _scale(layer, names[f"{layer}.lora_A.weight"].shape[0], told, metadata)
            pieces.append(Piece(f"{layer}.bias", names[name].reshape(-1, 1), one, scale))
        elif re.search(r"\.norm_(added_)?[qk]\.weight$", name):
            # As diffusers does with those of a control LoRA, whatever the strength.
            pieces.append(Piece(name, names[name].reshape(-1, 1), one, replaces=True))
        else:
            raise CheckpointError(
                f"{file} has {name}, which is no half of a low-rank pair with its other half beside it; only pairs are "
                f"fused: {_ELSEWHERE}"
            )
    return pieces


def _pair(
    file: Path, layer: str, down: Tensor, up: Tensor | None, told: Mapping[str, float], metadata: Mapping[str, Any]
) -> Piece:
    if up is None:
        raise CheckpointError(f"{file} has lora_A of {layer} without its lora_B; it is not whole: fetch it again")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(
            f"{file} has lora_A {list(down.shape)} and lora_B {list(up.shape)} for {layer}; a pair is [rank, in] and "
            "[out, rank]: it is damaged or for another model"
        )
    return Piece(f"{layer}.weight", up, down, _scale(layer, down.shape[0], told, metadata))


def _scale(layer: str, rank: int, told: Mapping[str, float], metadata: Mapping[str, Any]) -> float:
    """alpha / rank, 1 without an alpha; or as PEFT's own config says.

    Source: PEFT, LoraLayer.update_layer and get_pattern_key; its patterns are regular expressions for the end of a
    layer's name.
    """
    if not metadata:
        return told.get(layer, float(rank)) / rank
    alpha = metadata.get("lora_alpha", rank)
    for pattern, value in (metadata.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if metadata.get("use_rslora") else rank)


def _number(file: Path, name: str, alpha: Any) -> float:
    import torch

    values = torch.as_tensor(alpha).reshape(-1)
    if values.numel() != 1:
        raise CheckpointError(
            f"{file} has {values.numel()} numbers as {name}, an alpha is one; it is damaged, or no LoRA of this kind"
        )
    return float(values[0])


def _layer_of_alpha(name: str) -> str:
    return name.removeprefix("transformer.").split(".lora_")[0].removesuffix(".alpha")


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
