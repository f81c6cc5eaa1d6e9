"""A checkpoint in the diffusers folder layout, opened in place: configs and tensor positions, no weight data."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError
from fluxkiln.export.contents import REMEDY, Contents, hub_repository, open_contents
from fluxkiln.export.safetensors_header import encode_header, read_header, read_into
from fluxkiln.files import FileState
from fluxkiln.patches.model import Model
from fluxkiln.patches.registry import model_for
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    import numpy as np


FLOAT_DTYPES = ("BF16", "F16", "F32")
# Written by transformers and by diffusers, in this order.
WEIGHT_STEMS = ("model", "diffusion_pytorch_model")
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Configs and tensor positions of a checkpoint, and the model that it is one of.

    `configs` and `tensors` are keyed by component, and by `vae_tiny` where the folder has a tiny VAE; `configs` has
    `scheduler` as well. Tensors are keyed by their name in the module's `state_dict()`, which is also `TensorRef.name`;
    files are resolved, symlinks of the Hugging Face cache included. `sidecars` are the small files a bundle copies:
    tokenizers and scheduler, by their path below `root`. Once its bytes were read, `digests` are component -> tensor
    name -> sha256, and `states` weight file -> its size, times and inode then. `loras` are what `export.lora` put into
    it: file, sha256, strength, and which layers of the file were not found.
    """

    root: Path
    name: str
    variant: str
    configs: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, TensorRef]]
    sidecars: Mapping[str, Path]
    licence: Path | None
    model: Model
    digests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    states: Mapping[Path, FileState] = field(default_factory=dict)
    loras: tuple[Mapping[str, Any], ...] = ()


def open_checkpoint(root: Path, components: Collection[str] | None = None) -> Checkpoint:
    """Read `model_index.json`, each component's `config.json` and safetensors headers; no weight data, no torch.

    Args:
        root: a folder in the diffusers layout.
        components: those that must be there, all by default; others are not looked at.

    Raises:
        CheckpointError: a checkpoint of no model there is, or a damaged one; the message names the file and the tensor.
    """
    contents = _open_folder(root)
    root = contents.root
    model, index = _read_index(contents)
    configs: dict[str, Mapping[str, Any]] = {}
    for component in components or model.components:
        entry = index.get(component)
        if not isinstance(entry, list) or entry[-1:] != [model.classes[component]]:
            raise CheckpointError(
                f"{root / 'model_index.json'} has {str(entry)[:80]} as {component}, {model.title} has "
                f"{model.classes[component]}; {REMEDY}"
            )
        configs[component] = contents.read_json(f"{component}/config.json")
    for folder in model.classes.keys() - set(model.components):
        if (root / folder).is_dir():
            configs[folder] = contents.read_json(f"{folder}/config.json")
    read = tuple(configs)
    configs["scheduler"] = contents.read_json("scheduler/scheduler_config.json")
    model.check_configs(configs, str(root))
    return Checkpoint(
        root=root,
        name=_name(root),
        variant=model.variant(configs),
        configs=configs,
        tensors={folder: _read_component(contents, folder, model) for folder in read},
        sidecars=contents.sidecars(("scheduler", *model.tokenizers.values())),
        licence=contents.licence(),
        model=model,
    )


def find_model(root: Path) -> Model:
    """The model of the checkpoint in a folder; CheckpointError where there is none, or of no model there is."""
    return _read_index(_open_folder(root))[0]


def _open_folder(root: Path) -> Contents:
    if root.is_file():
        raise CheckpointError(
            f"{root} is a file, a checkpoint is a folder in the diffusers layout; convert a single file with its "
            "pipeline's from_single_file(...).save_pretrained(...)"
        )
    if not root.is_dir():
        raise CheckpointError(f"{root} does not exist; {REMEDY}")
    return open_contents(root)


def _read_index(contents: Contents) -> tuple[Model, dict[str, Any]]:
    index = contents.read_json("model_index.json")
    return model_for(index.get("_class_name"), str(contents.root / "model_index.json")), index


def read_tensor(ref: TensorRef) -> np.ndarray[Any, Any]:
    """The tensor's values as a fresh array of its own dtype; BF16 as `ml_dtypes.bfloat16`.

    Raises:
        CheckpointError: the file ends before the tensor does, the dtype has no numpy equivalent, or LoRAs make it no
            number.
    """
    return ref.change.apply(ref, _read_stored(ref), 0) if ref.change else _read_stored(ref)


def read_rows(ref: TensorRef, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Rows `start` to `stop` of a tensor, as `read_tensor`; nothing else of it is read."""
    row_bytes = ref.nbytes // ref.shape[0]
    rows = stop - start
    stored = _read_stored(
        replace(
            ref, shape=(rows, *ref.shape[1:]), offset=ref.offset + start * row_bytes, nbytes=rows * row_bytes
        )
    )  # fmt: skip
    return ref.change.apply(ref, stored, start) if ref.change else stored


def read_blocks(ref: TensorRef, most: int | None = None) -> Iterator[np.ndarray[Any, Any]]:
    """A tensor some rows at a time, `most` bytes and at least a row, as `read_tensor`."""
    if not ref.shape:
        yield read_tensor(ref)
        return
    step = max(1, (most or _BLOCK_BYTES) * ref.shape[0] // max(1, ref.nbytes))
    for start in range(0, ref.shape[0], step):
        yield read_rows(ref, start, min(start + step, ref.shape[0]))


def copy_tensors(refs: Iterable[TensorRef], target: Path) -> dict[str, TensorRef]:
    """Write a safetensors file with just these tensors, as they are read, a block at a time.

    Returns:
        Where they lie now.
    """
    refs = sorted(refs, key=lambda ref: ref.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as output:
        output.write(encode_header((ref.name, ref.dtype, ref.shape) for ref in refs))
        for block in (block for ref in refs for block in read_blocks(ref)):
            output.write(bytes_of(block))
    return read_header(target)


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view("u1").data


def _read_stored(ref: TensorRef) -> np.ndarray[Any, Any]:
    import ml_dtypes
    import numpy as np

    dtypes: dict[str, Any] = {
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "BOOL": np.bool_,
    }
    dtype = dtypes.get(ref.dtype) or np.dtype(f"<{ref.dtype[0].lower()}{int(ref.dtype[1:]) // 8}")
    array = np.empty(ref.shape, dtype)
    # readinto, not mmap: mapped pages count as resident memory of the process.
    with ref.file.open("rb", buffering=0) as stream:
        stream.seek(ref.offset)
        read_into(stream, bytes_of(array), ref)
    return array


def matrix_shape(ref: TensorRef) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: [O, I]; a vector is [O, 1]."""
    return (ref.shape[0], math.prod(ref.shape[1:])) if ref.shape else (1, 1)


class TensorReader:
    """Reads a checkpoint's tensors by component and name; as `read_tensor`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __call__(self, component: str, name: str) -> np.ndarray[Any, Any]:
        """Raises: CheckpointError: there is no such tensor, or as `read_tensor`."""
        ref = self.checkpoint.tensors[component].get(name)
        if ref is None:
            raise CheckpointError(f"{component} of {self.checkpoint.root} has no tensor {name}; {REMEDY}")
        return read_tensor(ref)

    def expect(self, component: str, names: Sequence[str]) -> None:
        """See `expect_tensors`; names that do not exist are passed over."""
        tensors = self.checkpoint.tensors[component]
        expect_tensors(tensors[name] for name in names if name in tensors)


def expect_tensors(refs: Iterable[TensorRef]) -> None:
    """Tell the system that these bytes are read next: it fetches them meanwhile, into memory that is nobody's."""
    for ref in refs:
        with suppress(OSError), ref.file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), ref.offset, ref.nbytes, os.POSIX_FADV_WILLNEED)


def _read_component(contents: Contents, component: str, model: Model) -> dict[str, TensorRef]:
    folder = contents.root / component
    indexes = [name for stem in WEIGHT_STEMS if (folder / (name := f"{stem}.safetensors.index.json")).exists()]
    singles = [name for stem in WEIGHT_STEMS if (folder / (name := f"{stem}.safetensors")).exists()]
    if len(indexes + singles) > 1:
        names = " and ".join(indexes + singles)
        raise CheckpointError(f"{folder} holds {names}, one of them must be the weights; remove the other")
    if not indexes + singles:
        wanted = " or ".join(f"{stem}.safetensors[.index.json]" for stem in WEIGHT_STEMS)
        raise CheckpointError(f"{folder} has no weights: {wanted} is missing; {REMEDY}")
    refs = (
        _read_sharded(contents, component, indexes[0])
        if indexes
        else read_header(contents.file(f"{component}/{singles[0]}"))
    )
    files = model.state_names(component, refs)
    return {name: refs[old] if name == old else replace(refs[old], name=name) for name, old in files.items()}


def _read_sharded(contents: Contents, component: str, index: str) -> dict[str, TensorRef]:
    folder = contents.root / component
    weight_map = contents.read_json(f"{component}/{index}").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder / index} has no weight_map from tensor to shard; copy or fetch it again")
    expected: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        expected.setdefault(shard, set()).add(name)
    refs: dict[str, TensorRef] = {}
    for shard in sorted(expected):
        # An index names neighbours of itself, never files elsewhere.
        if Path(shard).name != shard or not shard.isprintable():
            raise CheckpointError(
                f"{folder / index} names the shard {shard!r}; shards lie in the folder of their index"
            )
        file = contents.file(f"{component}/{shard}")
        if not file.exists():
            raise CheckpointError(f"shard {shard} is missing in {folder}, {index} names it; fetch it")
        header = read_header(file)
        for name in sorted(expected[shard] ^ header.keys()):
            owner, other = (index, shard) if name in expected[shard] else (shard, index)
            raise CheckpointError(
                f"{folder}: {owner} lists {name} for {shard}, {other} does not: index and shard are of different "
                f"checkpoints; fetch both again"
            )
        refs |= header
    return refs


def _name(root: Path) -> str:
    """`org/name` for a snapshot in the Hugging Face cache, otherwise the folder's name."""
    repository = hub_repository(root)
    return repository.name.removeprefix("models--").replace("--", "/", 1) if repository else root.name


def expected_tensors(model: Model, component: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the `state_dict()` that a component has with this config.

    Raises:
        CheckpointError: the class does not accept the config.
    """
    import torch

    class_name, cls = model.classes[component], model.load_class(component)
    try:
        with torch.device("meta"):
            if component in model.tokenizers:
                module = cls(cls.config_class.from_dict(dict(config)))
            else:
                module = cls.from_config(dict(config))
    except Exception as error:  # whatever a constructor raises about values it does not like
        raise CheckpointError(
            f"{component}/config.json does not describe a {class_name} ({type(error).__name__}: {error}); "
            f"copy or fetch it again"
        ) from error
    # a tied tensor has two names there; a checkpoint is opened with the first only
    tied = model.tied.get(component, ())
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if name not in tied}


def validate_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every opened component with its class: names, shapes, dtypes.

    Raises:
        CheckpointError: the first tensor that is missing, unexpected, of another shape or no float, and how many more.
    """
    for component, refs in checkpoint.tensors.items():
        expected = expected_tensors(checkpoint.model, component, checkpoint.configs[component])
        class_name = checkpoint.model.classes[component]
        where = f"{component} of {checkpoint.name}"
        if missing := [name for name in expected if name not in refs]:
            raise CheckpointError(
                f"{where} lacks {missing[0]}{_and_more(missing)}: its config.json describes a {class_name} with it; "
                f"config and weights are of different models: fetch both again"
            )
        if unexpected := [name for name in refs if name not in expected]:
            raise CheckpointError(
                f"{where} has {unexpected[0]}{_and_more(unexpected)}, which {class_name} with its config.json does not "
                f"know; merge adapters before compiling, or fetch config and weights again"
            )
        for name, shape in expected.items():
            if refs[name].shape != shape:
                raise CheckpointError(
                    f"{name} in {where} has the shape {list(refs[name].shape)}, {class_name} by its config.json has "
                    f"{list(shape)}; config and weights are of different models: fetch both again"
                )
            if refs[name].dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{name} in {where} is {refs[name].dtype}, weights must be {', '.join(FLOAT_DTYPES)}; fluxkiln "
                    f"quantizes by itself: give the unquantized checkpoint"
                )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
