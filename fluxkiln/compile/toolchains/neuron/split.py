"""A model cut over the cores of an instance: what is checked before any weight is read, and every core's weights."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, run_action, stage_code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.target import Instance, Target
from fluxkiln.compile.templates import Kiln
from fluxkiln.compile.toolchains.neuron.neuronx_cc import NeuronxCc, find_neuronx_cc
from fluxkiln.compile.toolchains.neuron.profile import (
    CoreMemory,
    all_instances,
    check_degree,
    check_memory,
    default_degree,
    find_instance,
    legal_degrees,
)
from fluxkiln.components import Part, Shapes
from fluxkiln.errors import ToolchainError, UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.fingerprint import check_shards
from fluxkiln.export.shard_files import WORKERS, write_part
from fluxkiln.export.split import SplitPart, bind_shard, list_split_parts, split_slots
from fluxkiln.patches.flux1.cuts import CUTS, columns_of, head_count, share_of
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.settings import Settings

if TYPE_CHECKING:
    from fluxkiln.build.context import Prepared

WEIGHTS = "weights"
# kinds of `fluxkiln.patches.flux1.parallel` -> kinds of `fluxkiln.components`
PART_KINDS: Mapping[str, str] = {
    "head": "modulated_head",
    "double": "double_modulated",
    "single": "single_modulated",
    "tail": "tail_modulated",
}
_BF16 = 2


@dataclass(frozen=True, slots=True)
class Split:
    """How a model is cut. `parts` are those of `Kiln.parts`, one to one; `compiler` is None where there is none."""

    instance: Instance
    degree: int
    granularity: str
    parts: tuple[SplitPart, ...]
    compiler: NeuronxCc | None = None

    def tools(self) -> dict[str, str]:
        """What lowers and compiles, and its versions."""
        from fluxkiln.compile.toolchains.neuron.modules import lowering_versions

        found = {"neuronx_cc": self.compiler.version} if self.compiler else {}
        return {**lowering_versions(), **found}

    def ranks(self, part: SplitPart) -> int:
        """How many cores a part runs on."""
        return part.ranks(self.degree)

    def find(self, name: str) -> SplitPart:
        """The split part called `name`."""
        return next(part for part in self.parts if part.name == name)


def plan_split(settings: Settings, target: Target, checkpoint: Checkpoint) -> Split:
    """How the model is cut for the instance that the settings name; no weight is read.

    Raises:
        UsageError: no such instance or granularity, a degree that its topology or the model's heads do not allow.
    """
    if settings.modulation != "hoisted":
        raise UsageError(
            f"modulation {settings.modulation!r}: for {target.name} all modulation is computed by the head, in one "
            "gather; leave --modulation out"
        )
    instance = find_instance(target, settings.instance)
    heads, widths = split_axes(checkpoint.configs)
    degree = settings.tp_degree or default_degree(instance, heads, widths)
    check_degree(instance, degree, heads, widths)
    parts = list_split_parts(_with_depths(checkpoint.configs), settings.granularity, settings.vae)
    built = settings.chosen
    chosen = tuple(part for part in parts if _component(part) in built)
    return Split(instance, degree, settings.granularity, chosen, _compiler())


def _compiler() -> NeuronxCc | None:
    try:
        return find_neuronx_cc()
    except ToolchainError:
        return None


def split_axes(configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, dict[str, int]]:
    """Attention heads of the transformer, which may be padded, and the axes that have to split evenly, by name."""
    widths: dict[str, int] = {}
    if "text_encoder_2" in configs:
        t5 = configs["text_encoder_2"]
        widths |= {"T5's heads": int(t5["num_heads"]), "T5's feed-forward": int(t5["d_ff"])}
    return int(configs["transformer"]["num_attention_heads"]) if "transformer" in configs else 1, widths


def parts_of_split(split: Split) -> tuple[Part, ...]:
    """The parts as the rest of a build knows them."""
    return tuple(Part(part.name, PART_KINDS.get(part.kind, part.kind), part.members[0][1]) for part in split.parts)


def inline_members(part: SplitPart) -> tuple[str, ...]:
    """The names of the first, ..., last of the parts that a whole model would have in its place."""
    if part.kind == "t5":
        return "t5_embed", "t5_final"
    numbers = (prefix.split(".")[1] if kind in ("double", "single") else "" for kind, prefix in part.members)
    return tuple(
        f"{kind}.{int(number):02d}" if number else kind for (kind, _), number in zip(part.members, numbers, strict=True)
    )


def plan_memory(kiln: Kiln) -> CoreMemory:
    """What the fullest core holds when everything stays loaded; by the checkpoint's shapes, no weight is read.

    Raises:
        ResourceError: too much, with the arithmetic and what would fit.
    """
    split, configs = kiln.split, kiln.checkpoint.configs
    assert split is not None
    activations = estimate_activations(configs, kiln.shapes, split.degree)
    heads, widths = split_axes(configs)
    legal = {degree for one in all_instances() for degree in legal_degrees(one, heads, widths)}
    weights = {degree: weights_per_core(split.parts, kiln.checkpoint, degree) for degree in {split.degree, *legal}}
    return check_memory(split.instance, split.degree, weights, activations)


def estimate_activations(configs: Mapping[str, Mapping[str, Any]], shapes: Shapes, degree: int) -> int:
    """Bytes of activations that are alive at once on a core, by the widest moments of a block and of the decoder.

    A block: scores of this core's heads in float32 and bfloat16, the joint tokens in float32, and their MLP. The
    decoder: four maps of its narrowest stage at the size of the image. The compiler tiles both and needs less.
    """
    widest = [0]
    if "transformer" in configs:
        flux = configs["transformer"]
        heads, joint = -(-int(flux["num_attention_heads"]) // degree), shapes.joint_tokens
        width = int(flux["num_attention_heads"]) * int(flux["attention_head_dim"])
        widest.append(6 * heads * joint**2 + joint * width * (4 * 4 + 2 * _BF16 * 4 // degree))
    if "vae" in configs:
        channels = int(configs["vae"].get("block_out_channels", [128])[0])
        widest.append(4 * _BF16 * channels * shapes.height * shapes.width)
    return max(widest)


def shard_weights(kiln: Kiln, progress: Progress, jobs: int | None = None) -> dict[str, tuple[Blob, ...]]:
    """Part -> the weights of each of its ranks as a safetensors file of the store, from the store or cut now.

    Raises:
        CheckpointError: a shard of the checkpoint went or changed meanwhile. ResourceError: the disk is full.
    """
    assert kiln.split is not None
    parts = kiln.split.parts
    progress.stage("shard", len(parts))
    known: dict[tuple[str, int], Any] = {}
    for part in parts:  # building a module is not for threads: it changes torch's default device
        alike = (part.kind, len(part.members))
        known[alike] = known.get(alike) or split_slots(part, kiln.checkpoint.configs, kiln.split.ranks(part))
    with ThreadPoolExecutor(jobs or WORKERS, "shard") as pool:
        futures = {
            part.name: pool.submit(_shard_part, kiln, part, known[part.kind, len(part.members)], progress)
            for part in parts
        }
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _shard_part(kiln: Kiln, part: SplitPart, slots: Any, progress: Progress) -> tuple[Blob, ...]:
    assert kiln.split is not None
    ranks = kiln.split.ranks(part)
    bindings = [bind_shard(part, slots, kiln.checkpoint, ranks, rank) for rank in range(ranks)]
    action = shard_action(kiln, part)

    def produce(folder: Path) -> tuple[dict[str, Path | Blob], dict[str, Any]]:
        files = write_part(slots, bindings, kiln.checkpoint, folder)
        check_shards(kiln.checkpoint, kiln.shards)
        store = kiln.cache.store
        return {
            str(file.rank): store.add_file(file.path, move=True, known="sha256:" + file.sha256) for file in files
        }, {}

    result = run_action(kiln.cache, action, produce)
    size = sum(blob.size for blob in result.outputs.values())
    progress.done("shard", part.name, FROM_STORE if result.hit else f"{ranks} files, {size / 1e6:.0f} MB")
    return tuple(result.outputs[str(rank)] for rank in range(ranks))


def runtime_constants(kiln: Kiln) -> dict[str, Any]:
    """What the host hands to the parts at run time, by name: rotary embedding, and of T5 what its form takes."""
    if kiln.split is None:
        from fluxkiln.export.host import host_constants

        return host_constants(kiln.checkpoint, kiln.shapes)
    from fluxkiln.export.host import rotary_embedding
    from fluxkiln.patches.flux1.parallel_text import position_buckets

    configs = kiln.checkpoint.configs
    constants: dict[str, Any] = {}
    if "transformer" in configs:
        constants |= rotary_embedding(configs["transformer"], kiln.shapes)
    if "text_encoder_2" in configs:
        constants["position_buckets"] = position_buckets(configs["text_encoder_2"], kiln.shapes.tokens)
    return constants


def split_settings(prepared: Prepared) -> dict[str, Any]:
    """How a split model is cut; nothing for others."""
    split = prepared.kiln.split
    if split is None:
        return {}
    return {
        "instance": split.instance.name,
        "tp_degree": split.degree,
        "granularity": split.granularity,
        "flags": prepared.settings.flags,
    }


def shard_action(kiln: Kiln, part: SplitPart) -> Action:
    """The key of a part's shards: the tensors that it holds, how it is cut, over how many ranks."""
    assert kiln.split is not None
    known = kiln.digests[part.component]
    refs = [
        [name, known[name], list(ref.shape), ref.dtype]
        for name, ref in kiln.checkpoint.tensors[part.component].items()
        if holds_tensor(part, name)
    ]
    ranks = kiln.split.ranks(part)
    return Action(
        stage="shard",
        what=f"{part.name} tp{ranks}",
        code_version=stage_code_version(
            "fluxkiln.export.shard_files", "fluxkiln.export.split", "fluxkiln.export.checkpoint", "fluxkiln.patches"
        ),
        inputs={"weights": "sha256:" + hashlib.sha256(json.dumps(refs).encode()).hexdigest()},
        settings={"ranks": ranks, "members": [list(member) for member in part.members], "dtype": "BF16"},
    )


def holds_tensor(part: SplitPart, name: str) -> bool:
    """Whether a part has a tensor of its component, or some of it."""
    for kind, prefix in part.members:
        local = name.removeprefix(prefix)
        if name.startswith(prefix) and any(
            local == cut.source or (not cut.source and re.fullmatch(cut.slots, local)) for cut in CUTS[kind]
        ):
            return True
    return False


def held_elements(checkpoint: Checkpoint, part: SplitPart) -> int:
    """Elements of all tensors that a part has some of."""
    tensors = checkpoint.tensors[part.component].items()
    return sum(math.prod(ref.shape) for name, ref in tensors if holds_tensor(part, name))


def shard_file(part: str, rank: int) -> str:
    """The path of a rank's weights in a bundle."""
    return f"{WEIGHTS}/{part}/tp{rank}.safetensors"


def weights_per_core(parts: tuple[SplitPart, ...], checkpoint: Checkpoint, degree: int) -> dict[str, int]:
    """Component -> bytes of its weights on the first core, which has the parts that are not cut."""
    found: dict[str, int] = {}
    for component in dict.fromkeys(part.component for part in parts):
        owners: dict[str, list[tuple[str, int]]] = {}
        for part in parts:
            for kind, prefix in part.members if part.component == component else ():
                owners.setdefault(prefix, []).append((kind, part.ranks(degree)))
        size = 0
        for name, ref in checkpoint.tensors[component].items():
            pieces = name.split(".")
            for prefix in ("", *(".".join(pieces[: i + 1]) + "." for i in range(len(pieces) - 1))):
                for kind, ranks in owners.get(prefix, ()):
                    size += _BF16 * _share(kind, name.removeprefix(prefix), ref.shape, checkpoint.configs, ranks)
        label = "vae" if component == "vae_tiny" else component
        found[label] = found.get(label, 0) + size
    return found


def _share(kind: str, slot: str, shape: tuple[int, ...], configs: Mapping[str, Mapping[str, Any]], ranks: int) -> int:
    """Elements that rank 0 has of a tensor in a part of `kind`."""
    total = 0
    for cut in CUTS[kind]:
        if slot == cut.source or (not cut.source and re.fullmatch(cut.slots, slot)):
            start, stop = columns_of(cut, shape)
            taken = (*shape[:-1], stop - start)
            share = share_of(cut, slot, taken, head_count(kind, configs), ranks, 0)
            local = taken if share is None else (*taken[: share.axis], share.size, *taken[share.axis + 1 :])
            total += math.prod(local)
    return total


def _component(part: SplitPart) -> str:
    return "vae" if part.component == "vae_tiny" else part.component


def _with_depths(configs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Configs of components that are not there stand for models without blocks."""
    return {"transformer": {"num_layers": 0, "num_single_layers": 0}, **configs}
