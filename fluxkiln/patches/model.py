"""What a model is: everything that is true of one family of checkpoints and of no other.

A model is a folder beside this file, or a package of somebody else's that is registered under the entry-point group
`fluxkiln.models`. Nothing outside of it names a kind of its parts, a depth or a tensor. Usually one subclasses the
model it resembles.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fluxkiln.types import BindingLicence, Configs, Kind, Part, Shapes, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.nn import Module

    from fluxkiln.patches.cut import Collectives, Cut, ParallelPart
    from fluxkiln.patches.patch import Patch
    from fluxkiln.patches.pipeline import OnLatents, PartChain, Pipeline, PipelineFiles, Rendering, Sampling

# Of this protocol; raised when a method is added or changes its meaning.
API = 5

Config = Mapping[str, Any]
# component and tensor -> its values
ReadTensor = Callable[[str, str], "NDArray[Any]"]
# {"inputs": {name: file}, "outputs": {name: file}} of one run of a part
Call = Mapping[str, Mapping[str, str]]
# (part, inputs, outputs): one call of a part, tensors by the names its kind declares
Put = Callable[[Part, Mapping[str, Any], Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Preset:
    """A synthetic model: the config of every component, the size it is built at by default.

    `steps` are the denoising steps of a build's reference run. `trained` is the folder of its checkpoint where it has
    weights that mean something; they ship with the model. `hub` is the Hugging Face id of the model whose shapes it
    has.
    """

    name: str
    summary: str
    variant: str
    size: tuple[int, int]
    tokens: int
    configs: Mapping[str, Config]
    trained: Path | None = None
    steps: int = 2
    hub: str = ""


@dataclass(frozen=True, slots=True)
class Pin:
    """A number at a fixed place of a tensor, whatever is drawn there.

    `run` counts the rule's runs of rows; `row`, within the run, and `column` are places from 0 to 1.
    """

    run: int
    row: float
    value: float
    column: float = 0.0


@dataclass(frozen=True, slots=True)
class WeightRule:
    """How tensors whose name matches `pattern` are drawn: uniform around `mean`.

    The standard deviation is `gain / sqrt(fan_in)` with `fan_in` set, plain `gain` without.

    Attributes:
        runs: factors for equal runs of rows.
        tails: bell-shaped with long tails, kurtosis 5, in the place of uniform.
        rows, columns: of matrices; each row or column is larger by a power of two whose exponent is drawn from these.
            The standard deviation of the whole stays.
    """

    pattern: str
    gain: float
    mean: float = 0.0
    fan_in: bool = True
    runs: tuple[float, ...] = ()
    tails: bool = False
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    pins: tuple[Pin, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightUse:
    """How often an image step uses each matrix of a component, on average; `idle` are beginnings of names it does not
    run at all (tables, the half of a VAE that makes latents of images)."""

    times: float
    idle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor as another program has it: the rows of `sources`, the checkpoint's own, one after the other.

    Attributes:
        swapped: of each the second half comes first.
        kernel: `OHWI` for one of a convolution whose input channels are last there; `1x1` for a matrix.
    """

    name: str
    sources: tuple[str, ...]
    swapped: bool = False
    kernel: Literal["", "OHWI", "1x1"] = ""


@dataclass(frozen=True, slots=True)
class OtherLayout:
    """A component as programs of others have it.

    Attributes:
        architecture: what they call it; facts: what their files say of it, by key.
        stretch: how often a row is to be repeated until the component has the one width that diffusers' converter to
            its own names takes for granted; 0 where there is no such number, or no converter.
        fixed: keys of the component's config with the values that those programs take for granted.
        file: what its file is called, where they look for a name.
    """

    tensors: tuple[Joined, ...]
    architecture: str = ""
    facts: Mapping[str, int | float | str] = field(default_factory=dict)
    stretch: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""


class Recorded(Protocol):
    """A recorded reference run: part -> its kind, and the calls of it; files lie below `root`."""

    @property
    def root(self) -> Path: ...
    @property
    def kinds(self) -> Mapping[str, str]: ...
    @property
    def calls(self) -> Mapping[str, tuple[Call, ...]]: ...


class Model(Protocol):
    """One family of checkpoints.

    Attributes:
        api: the API of this protocol that it was written for. title: what people call it.
        pipeline_class: of `model_index.json`, which is how a checkpoint's model is found.
        classes: folder with weights -> class of its model; libraries: the package it is in. For a component, as
            `model_index.json` has them.
        components: those of a pipeline, in the order in which an image needs them; tokenizers: theirs, by component.
        whole_numbers: component -> keys of its config that say how often something is in it.
        stacks: component -> lists of blocks in it, whose weights are read one block at a time, by the kind of block;
            components that are not named are read as a whole. first_is_needed: those whose first block makes what all
            others take.
        calibrated: components whose linear layers a scheme may quantize. adapted: the one that LoRAs are trained for.
        tied: component -> second names of tensors in its `state_dict()`.
        weight_rules: folder with weights -> how those of a synthetic model are drawn; the first that matches counts.
        statistics: name -> rules that may be asked for in their place.
        generator: raised when the same preset and seed give other bytes.
        constant_inputs: of parts, what the host gives.
        hub_ids: variant -> where it is published. binding_licences: those that bind who passes it on.
        most_tokens: variant -> the most text tokens it takes. steps: variant -> denoising steps of an ordinary image.

    It may have `relatives` as well: class of a pipeline near it that is not compiled, or what names of its
    repositories begin with -> what that is, what is planned; the longer names first. And `lora_prefixes`: what names of
    a LoRA's layers begin with -> the component that they are of.
    """

    api: int
    name: str
    title: str
    pipeline_class: str
    classes: Mapping[str, str]
    libraries: Mapping[str, str]
    components: tuple[str, ...]
    tokenizers: Mapping[str, str]
    whole_numbers: Mapping[str, tuple[str, ...]]
    stacks: Mapping[str, Mapping[str, str]]
    first_is_needed: tuple[str, ...]
    calibrated: tuple[str, ...]
    adapted: str
    tied: Mapping[str, tuple[str, ...]]
    hub_ids: Mapping[str, str]
    binding_licences: tuple[BindingLicence, ...]
    most_tokens: Mapping[str, int]
    steps: Mapping[str, int]
    kinds: Mapping[str, Kind]
    presets: Mapping[str, Preset]
    weight_rules: Mapping[str, tuple[WeightRule, ...]]
    statistics: Mapping[str, Mapping[str, tuple[WeightRule, ...]]]
    generator: int
    constant_inputs: tuple[str, ...]

    # The checkpoint.

    def variant(self, configs: Configs) -> str:
        """`dev` or `schnell`, say."""

    def check_configs(self, configs: Configs, where: str) -> None:
        """Raise CheckpointError where configs, by folder, lack a key, hold an illegal one or contradict each other."""

    def load_sidecars(self, root: Path, components: Collection[str]) -> dict[str, Any]:
        """The scheduler and the tokenizers of these components by their folder; CheckpointError for a broken one."""

    def state_names(self, component: str, names: Iterable[str]) -> Mapping[str, str]:
        """Name in the module's `state_dict()` -> name in the files, which have those of older releases."""

    def licence(self, text: str, variant: str) -> str:
        """The SPDX name of the licence of a checkpoint with this text, which may be empty."""

    def load_class(self, folder: str) -> Any:
        """The class of what is in a folder of the checkpoint; imports it."""

    def load_pipeline_class(self) -> Any:
        """diffusers' class of the whole; imports it."""

    def convert_lora(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a LoRA file -> the same by diffusers' names; whatever diffusers' converters raise."""

    # Synthetic checkpoints.

    def layout(self, folder: str, config: Config) -> dict[str, tuple[int, ...]]:
        """Names, as files have them, and shapes of the tensors of a component; no heavy import."""

    def as_others(self, layout: str, component: str, configs: Configs) -> OtherLayout:
        """A component as programs of others have it; UsageError where it has no such layout."""

    def write_tokenizers(self, root: Path, configs: Configs, sentences: Sequence[str] = ()) -> dict[str, str]:
        """The tokenizers of these components below the folder `root`; their folders and classes."""

    # Its parts.

    def list_parts(self, configs: Configs, vae: Any, modulation: Any) -> tuple[Part, ...]:
        """All parts in the order they run; of components without a config, those that there are but once.

        Raises: UsageError: there is no such form.
        """

    def list_split_parts(self, configs: Configs, granularity: str, vae: Any) -> tuple[Part, ...]:
        """The same of a model that is cut over ranks; UsageError for a granularity that there is not."""

    def recorded_parts(self, configs: Configs, vae: Any) -> tuple[Part, ...]:
        """The parts to record so that one run of the reference serves all forms."""

    def recorded_calls(self, recorded: Recorded, part: Part) -> tuple[Call, ...]:
        """The calls of a part of any form, made of those of `recorded_parts`; UsageError where they cannot be."""

    def modulation_name(self, part: Part) -> str:
        """The part that gives the input `modulation` of a part."""

    def part_inputs(self, kind: str, configs: Configs, shapes: Shapes) -> tuple[TensorSpec, ...]:
        """The activations a part takes, in the order of its kind's inputs."""

    def build_part(self, kind: str, configs: Configs) -> Module:
        """The wrapper module of a kind on the meta device; CheckpointError for a structure it does not cover."""

    def patches(self) -> tuple[Patch, ...]:
        """Every rewrite of upstream, in the order they are applied."""

    def host_constants(self, configs: Configs, shapes: Shapes, read: ReadTensor, split: bool) -> dict[str, Any]:
        """What the host hands to the parts of the components that are there, by name."""

    def weight_uses(self, shapes: Shapes) -> Mapping[str, WeightUse]:
        """Component -> how much of it an image step runs."""

    # Cut over ranks.

    @property
    def cuts(self) -> Mapping[str, tuple[Cut, ...]]:
        """What a kind is called there -> how each of its weights is cut."""

    def head_count(self, cut: str, configs: Configs) -> int:
        """Attention heads of the component that a kind is cut from; 1 for kinds that are not cut by heads."""

    def split_axes(self, configs: Configs) -> tuple[int, dict[str, int]]:
        """Attention heads of the transformer, which may be padded, and the axes that have to split evenly, by name."""

    def activation_bytes(self, configs: Configs, shapes: Shapes, degree: int) -> int:
        """Bytes of activations that are alive at once on one of `degree` ranks."""

    def build_parallel_part(
        self, part: Part, configs: Configs, shapes: Shapes, collectives: Collectives
    ) -> ParallelPart:
        """The module of a part for one of `collectives.ranks` ranks, on the meta device."""

    def modulation_rows(self, configs: Configs) -> dict[str, tuple[int, int]]:
        """Rows [start, stop) of the head's modulation, by the part they are for."""

    # The pipeline.

    def observe(self, pipe: Any, part: Part, put: Put) -> None:
        """Have `put` called each time a part runs in diffusers' pipeline."""

    def build_pipeline(self, files: PipelineFiles, chain: PartChain, shapes: Shapes) -> Pipeline:
        """The published pipeline's loop with the parts of `chain` in the place of its models; it needs no torch.

        Raises: ShapeError: host constants were made for other shapes. CheckpointError: a broken tokenizer or scheduler.
        """

    # The published pipeline, `pipe`.

    def render(self, pipe: Any, shapes: Shapes, sampling: Sampling, on_latents: OnLatents | None = None) -> Rendering:
        """Run diffusers' pipeline on a prompt; what a component that is None would have made is random numbers."""

    def encode(self, pipe: Any, shapes: Shapes, prompt: str) -> dict[str, NDArray[Any]]:
        """A prompt as `denoise` takes it, by diffusers' argument names."""

    def denoise(
        self, pipe: Any, encoded: Mapping[str, Any], shapes: Shapes, after_step: Callable[..., Any], **sampling: Any
    ) -> None:
        """Run the loop: `steps`, `guidance`, `random`, a torch.Generator."""

    def decode(self, pipe: Any, shapes: Shapes, latents: NDArray[Any]) -> NDArray[Any]:
        """The image [height, width, 3] in 0..1 of packed latents."""

    # Training.

    def encode_image(self, pipe: Any, image: NDArray[Any]) -> NDArray[Any]:
        """Latents [1, S, 4C] float32, as `denoise` has them, of an image [height, width, 3] in 0..1."""

    def predict(
        self, module: Module, latents: Tensor, sigma: Tensor, encoded: Mapping[str, Tensor], shapes: Shapes,
        guidance: float | Tensor,
    ) -> Tensor:  # fmt: skip
        """The velocity [B, S, 4C], noise minus picture, that the adapted component finds in noisy latents [B, S, 4C].

        `sigma` [B] is the share of noise; `encoded` what `encode` gives, with B rows; `guidance` one for all, or [B].
        """

    def begin_training(self, module: Module) -> None:
        """Give the adapted component the weights that training from nothing begins with."""

    def halfway(self, module: Module) -> Module:
        """The block of the adapted component whose last output [B, S, D] is the image half-way, for training."""

    def build_in_guidance(self, teacher: Module, student: Module, guidance: float) -> None:
        """Give `student`, the adapted component without an input for guidance, the weights of `teacher`, which has one,
        so that it computes what the teacher does at this guidance."""

    def mlx_lora(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Layer -> down [R, I] and up [O, R], strength 1, in the layout of ml-explore/mlx-examples; empty where that
        has no such model."""

    def see_split_leaves(
        self,
        part: Part,
        configs: Configs,
        inputs: Mapping[str, Any],
        state: Mapping[str, Any],
        load: Callable[..., Any],
    ) -> Any:
        """What upstream's own leaf modules make in the place of a split part, in call order; for `debug`."""


def block_kinds(model: Model) -> dict[str, str]:
    """Every list of blocks of a model (`transformer_blocks`) -> the kind of those in it."""
    return {stack: kind for stacks in model.stacks.values() for stack, kind in stacks.items()}
