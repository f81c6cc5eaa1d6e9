"""A checkpoint in the diffusers folder layout, opened in place: configs and tensor positions, no weight data."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError
from fluxkiln.export.safetensors_header import read_header, read_into
from fluxkiln.files import FileState
from fluxkiln.patches.model import Model
from fluxkiln.patches.registry import model_for
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    import numpy as np


FLOAT_DTYPES = ("BF16", "F16", "F32")
# Written by transformers and by diffusers, in this order.
WEIGHT_STEMS = ("model", "diffusion_pytorch_model")
_REMEDY = "give a folder that a pipeline's save_pretrained wrote, a Hugging Face id, or a synthetic preset"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Configs and tensor positions of a checkpoint, and the model that it is one of.

    `configs` and `tensors` are keyed by component, and by `vae_tiny` where the folder has a tiny VAE; `configs` has
    `scheduler` as well. Tensors are keyed by their name in the module's `state_dict()`, which is also `TensorRef.name`;
    files are resolved, symlinks of the Hugging Face cache included. `sidecars` are the small files a bundle copies:
    tokenizers and scheduler, by their path below `root`. Once its bytes were read, `digests` are component -> tensor
    name -> sha256, and `states` weight file -> its size, times and inode then.
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


def open_checkpoint(root: Path, components: Collection[str] | None = None) -> Checkpoint:
    """Read `model_index.json`, each component's `config.json` and safetensors headers; no weight data, no torch.

    Args:
        root: a folder in the diffusers layout.
        components: those that must be there, all by default; others are not looked at.

    Raises:
        CheckpointError: a checkpoint of no model there is, or a damaged one; the message names the file and the tensor.
    """
    model, index = _read_index(root)
    root = root.absolute()
    configs: dict[str, Mapping[str, Any]] = {}
    tensors: dict[str, Mapping[str, TensorRef]] = {}
    for component in components or model.components:
        entry = index.get(component)
        if not isinstance(entry, list) or entry[-1:] != [model.classes[component]]:
            raise CheckpointError(
                f"{root / 'model_index.json'} has {entry!r} as {component}, {model.title} has "
                f"{model.classes[component]}; {_REMEDY}"
            )
        configs[component] = _read_config(root, component, model)
        tensors[component] = _read_component(root, component, model)
    for folder in model.classes.keys() - set(model.components):
        if (root / folder).is_dir():
            configs[folder] = _read_config(root, folder, model)
            tensors[folder] = _read_component(root, folder, model)
    configs["scheduler"] = _read_json(root, "scheduler/scheduler_config.json")
    beside = ("scheduler", *model.tokenizers.values())
    sidecars = sorted(file for name in beside for file in (root / name).glob("*") if file.is_file())
    licences = sorted(path for path in root.iterdir() if path.is_file() and path.stem.lower() in ("license", "licence"))
    return Checkpoint(
        root=root,
        name=_name(root),
        variant=model.variant(configs),
        configs=configs,
        tensors=tensors,
        sidecars={str(file.relative_to(root)): file.resolve() for file in sidecars},
        licence=licences[0].resolve() if licences else None,
        model=model,
    )


def find_model(root: Path) -> Model:
    """The model of the checkpoint in a folder; CheckpointError where there is none, or of no model there is."""
    return _read_index(root)[0]


def _read_index(root: Path) -> tuple[Model, dict[str, Any]]:
    if root.is_file():
        raise CheckpointError(
            f"{root} is a file, a checkpoint is a folder in the diffusers layout; convert a single file with its "
            "pipeline's from_single_file(...).save_pretrained(...)"
        )
    if not root.is_dir():
        raise CheckpointError(f"{root} does not exist; {_REMEDY}")
    index = _read_json(root, "model_index.json")
    return model_for(index.get("_class_name"), str(root / "model_index.json")), index


def read_tensor(ref: TensorRef) -> np.ndarray[Any, Any]:
    """The tensor's values as a fresh array of its own dtype; BF16 as `ml_dtypes.bfloat16`.

    Raises:
        CheckpointError: the file ends before the tensor does, or the dtype has no numpy equivalent.
    """
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
        read_into(stream, array.reshape(-1).view(np.uint8).data, ref)
    return array


def read_rows(ref: TensorRef, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Rows `start` to `stop` of a tensor, as `read_tensor`; nothing else of it is read."""
    row_bytes = ref.nbytes // ref.shape[0]
    rows = stop - start
    return read_tensor(
        replace(
            ref, shape=(rows, *ref.shape[1:]), offset=ref.offset + start * row_bytes, nbytes=rows * row_bytes
        )
    )  # fmt: skip


class TensorReader:
    """Reads a checkpoint's tensors by component and name; as `read_tensor`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __call__(self, component: str, name: str) -> np.ndarray[Any, Any]:
        """Raises: CheckpointError: there is no such tensor, or as `read_tensor`."""
        ref = self.checkpoint.tensors[component].get(name)
        if ref is None:
            raise CheckpointError(f"{component} of {self.checkpoint.root} has no tensor {name}; {_REMEDY}")
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


def _read_json(root: Path, relative: str) -> dict[str, Any]:
    path = root / relative
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{root} is no diffusers checkpoint: {relative} is missing; {_REMEDY}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); copy or fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object; copy or fetch it again")
    return value


def _read_config(root: Path, component: str, model: Model) -> dict[str, Any]:
    config = _read_json(root, f"{component}/config.json")
    for key in model.whole_numbers.get(component, ()):
        if type(config.get(key)) is not int or config[key] < 1:
            raise CheckpointError(
                f"{root / component / 'config.json'} has {key} = {config.get(key)!r}, it must be a whole number; "
                f"copy or fetch it again"
            )
    return config


def _read_component(root: Path, component: str, model: Model) -> dict[str, TensorRef]:
    folder = root / component
    indexes = [path for stem in WEIGHT_STEMS if (path := folder / f"{stem}.safetensors.index.json").exists()]
    singles = [path for stem in WEIGHT_STEMS if (path := folder / f"{stem}.safetensors").exists()]
    found = indexes + singles
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise CheckpointError(f"{folder} holds {names}, one of them must be the weights; remove the other")
    if not found:
        wanted = " or ".join(f"{stem}.safetensors[.index.json]" for stem in WEIGHT_STEMS)
        raise CheckpointError(f"{folder} has no weights: {wanted} is missing; {_REMEDY}")
    refs = _read_sharded(folder, indexes[0]) if indexes else read_header(singles[0].resolve())
    files = model.state_names(component, refs)
    return {name: refs[old] if name == old else replace(refs[old], name=name) for name, old in files.items()}


def _read_sharded(folder: Path, index_path: Path) -> dict[str, TensorRef]:
    weight_map = _read_json(folder, index_path.name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map from tensor to shard; copy or fetch it again")
    refs: dict[str, TensorRef] = {}
    for shard in sorted(set(weight_map.values())):
        # An index names neighbours of itself, never files elsewhere.
        if Path(shard).name != shard:
            raise CheckpointError(f"{index_path} names the shard {shard!r}; shards lie in the folder of their index")
        if not (folder / shard).exists():
            raise CheckpointError(f"shard {shard} is missing in {folder}, {index_path.name} names it; fetch it")
        header = read_header((folder / shard).resolve())
        expected = {name for name, owner in weight_map.items() if owner == shard}
        for name in sorted(expected ^ header.keys()):
            owner, other = (index_path.name, shard) if name in expected else (shard, index_path.name)
            raise CheckpointError(
                f"{folder}: {owner} lists {name} for {shard}, {other} does not: index and shard are of different "
                f"checkpoints; fetch both again"
            )
        refs |= header
    return refs


def _name(root: Path) -> str:
    """`org/name` for a snapshot in the Hugging Face cache, otherwise the folder's name."""
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return root.name


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
