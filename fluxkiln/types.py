"""The frozen values that stages hand to one another.

Shape suffix legend used across the package:
    B = batch (always 1), S = image tokens, T = text tokens, J = T + S (joint sequence, text first),
    D = transformer width, H = attention heads, K = head width, C = latent channels, P = pooled projection width,
    M = rows: denoising steps that parts which run once per image take at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fluxkiln.errors import ShapeError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

GraphFormat = Literal["onnx17", "onnx23", "pt2", "torchscript"]

# Executes one part: its name and inputs by the kind's input names (float32, token ids int64) -> outputs by the kind's
# output names, float32. Guidance is left out where the model takes none.
PartRunner = Callable[[str, "Mapping[str, NDArray[Any]]"], "dict[str, NDArray[Any]]"]

# slot -> its weight in torch's own layout
WeightReader = Callable[[str], "NDArray[Any]"]

# ends the name of a slot whose weight a template takes transposed
TRANSPOSED = "__t"


Configs = Mapping[str, Mapping[str, Any]]
SIZE_MULTIPLE = 16
# behind it stands the size, in names of what is there for one of several
SIZE_MARK = "@"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of part: compiled once, cast for every part of the kind. Kinds are a model's own.

    Attributes:
        residual: output -> the input it is a residual update of; parity is judged on their difference.
        rows: inputs whose first axis is an image's steps, `most_rows` of them, as is that of all outputs then.
        folder: of the checkpoint, where its tensors are if not in that of the component.
        own, without: beginnings of its tensors' names behind the part's prefix, and of those that are not its own.
        tables: endings of the names of matrices that are looked up in, not multiplied with.
        stored: the scheme of its weights: `blocks` for the one that is asked for, else what a quantized model has here.
        overflows: its activations leave the range of F16.
        narrow_inputs: what passes between blocks comes in 16 bits; `norms` where only norms and SiLU read it.
        narrow_outputs: what it hands on goes in 16 bits.
        family: what an exception of a scheme calls it; block: the same, of which its modulation is a piece.
        rotated: queries and keys that it rotates by their position, over all its streams.
        timed: outputs that embed the timestep through its sines and cosines.
        ordered: its nodes stand in the order in which a chip is to run them.
        traced_on: `cpu` where constants are made while it runs; convolutional: it has spatial inputs and outputs.
        cut: what it is called in the model's table of cuts; empty where it is never cut over ranks.
    """

    name: str
    component: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    residual: tuple[tuple[str, str], ...] = ()
    rows: tuple[str, ...] = ()
    most_rows: int = 0
    folder: str = ""
    own: tuple[str, ...] = ("",)
    without: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    stored: Literal["blocks", "BF16", "F16"] = "BF16"
    overflows: bool = False
    narrow_inputs: Literal["", "all", "norms"] = ""
    narrow_outputs: bool = False
    family: str = ""
    block: str = ""
    rotated: int = 0
    timed: tuple[str, ...] = ()
    ordered: bool = False
    traced_on: Literal["meta", "cpu"] = "meta"
    convolutional: bool = False
    cut: str = ""

    @property
    def each_step(self) -> bool:
        """Whether its parts run at every denoising step; the others run once per image."""
        return self.component == "transformer" and not self.rows

    @property
    def is_block(self) -> bool:
        """Whether it is one of the transformer's blocks, which update the residual streams of an image."""
        return self.component == "transformer" and bool(self.residual)


@dataclass(frozen=True, slots=True)
class Part:
    """One unit of compilation.

    Attributes:
        traits: its kind. prefix: where its tensors start in the component's state dict.
        members: of a model that is cut over ranks, what the part holds in the order it runs: kind of the table of cuts
            and prefix. A part of several has the number of the member in front of its slots: `0.attn.to_q.weight`.
        sizes: of a build of several sizes those that it is for; its graph is for the first of them. See
            `patches.sizes`.
    """

    name: str
    traits: Kind
    prefix: str = ""
    members: tuple[tuple[str, str], ...] = ()
    sizes: tuple[Shapes, ...] = ()

    @property
    def base(self) -> str:
        """What the part is called at every size: `double.00` for `double.00@768x1344-512`."""
        return self.name.partition(SIZE_MARK)[0]

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.traits.name

    @property
    def component(self) -> str:
        return self.traits.component

    @property
    def folder(self) -> str:
        """The key of `Checkpoint.tensors` and of configs where its weights are."""
        return self.traits.folder or self.traits.component

    def ranks(self, degree: int) -> int:
        """How many ranks it runs on when the parts that are cut run on `degree`."""
        return degree if self.traits.cut else 1


@dataclass(frozen=True, slots=True)
class BindingLicence:
    """A licence that binds whoever passes on a variant of a model or what is made of it: its text must go with it.

    Attributes:
        accepted_as: what a publisher calls it who accepts it; card_name: what model cards call it.
        model: what is under it, for people; title: its own; pattern: a regular expression for the title in its text.
    """

    spdx: str
    variant: str
    accepted_as: str
    card_name: str
    model: str
    title: str
    pattern: str


def find_part(parts: tuple[Part, ...], name: str) -> Part:
    """The part called `name`; UsageError with the legal names otherwise."""
    for part in parts:
        if part.name == name:
            return part
    raise UsageError(f"no part is called {name!r}; this model has {', '.join(part.name for part in parts)}")


def list_kinds(parts: tuple[Part, ...]) -> dict[str, Kind]:
    """The kinds of the parts by name, each once, in the order they run."""
    return {part.kind: part.traits for part in parts}


def check_steps(parts: tuple[Part, ...], steps: int) -> None:
    """Raise UsageError when parts that take all steps at once are asked for more than they have rows."""
    for part in parts:
        if part.traits.rows and steps > part.traits.most_rows:
            raise UsageError(
                f"{steps} steps: the hoisted modulation is computed for at most {part.traits.most_rows} at once; use "
                f"at most {part.traits.most_rows} steps, or the inline form"
            )


@dataclass(frozen=True, slots=True)
class Shapes:
    """Static shapes of a build. ShapeError: a side is no positive multiple of 16, or there are no tokens."""

    height: int
    width: int
    tokens: int

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if value <= 0 or value % SIZE_MULTIPLE:
                lower = max(SIZE_MULTIPLE, value - value % SIZE_MULTIPLE)
                raise ShapeError(
                    f"{name} {value} is not a positive multiple of {SIZE_MULTIPLE}; the nearest legal values are "
                    f"{lower} and {lower + SIZE_MULTIPLE}"
                )
        if self.tokens <= 0:
            raise ShapeError(f"{self.tokens} text tokens: at least 1 is needed, 512 is FLUX.1-dev's own number")

    @property
    def label(self) -> str:
        """`768x1344-512`: width, height, text tokens."""
        return f"{self.width}x{self.height}-{self.tokens}"

    @property
    def image_tokens(self) -> int:
        return (self.height // SIZE_MULTIPLE) * (self.width // SIZE_MULTIPLE)

    @property
    def joint_tokens(self) -> int:
        return self.tokens + self.image_tokens

    @property
    def latent_hw(self) -> tuple[int, int]:
        """Height and width of the unpacked latents; the VAE enlarges them 8 times."""
        return self.height // 8, self.width // 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, static shape and torch dtype name (`float32`, `int64`, ...) of a graph input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


class RowChange(Protocol):
    """What is done to a tensor's rows when they are read; see `export.change`."""

    def digest(self, stored: str) -> str:
        """The digest of the changed tensor, from that of the stored one."""

    def apply(self, ref: TensorRef, stored: NDArray[Any], first: int) -> NDArray[Any]:
        """Rows from `first` on as they are stored -> as they are changed, of the same dtype and shape."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a checkpoint tensor lies: a byte range of a safetensors file, little-endian, row-major.

    `offset` counts from the start of the file, header included; `dtype` is safetensors' own code (`BF16`, `F32`, ...).
    With a `change` the tensor is what `export.checkpoint` reads, and nowhere in a file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    change: RowChange | None = None

    @property
    def stored(self) -> TensorRef:
        """The tensor as its file has it."""
        return replace(self, change=None) if self.change else self


@dataclass(frozen=True, slots=True)
class Transform:
    """One step from checkpoint tensors to a slot.

    `transpose`: swap the two axes of a matrix. `slice`: keep `[start, stop)` of axis `dim`. `concat`: join all sources
    along `dim` (always first). `scale`: multiply by `factor`. `pad`: zeros behind, up to `stop` entries of axis `dim`.
    """

    op: Literal["transpose", "slice", "concat", "scale", "pad"]
    dim: int = 0
    start: int = 0
    stop: int = 0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class SlotBinding:
    """How one slot of a template is filled: checkpoint tensor names, then transforms in order."""

    slot: str
    sources: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()


@dataclass(frozen=True, slots=True)
class Binding:
    """How every slot of one part is filled from one component of a checkpoint."""

    part: str
    component: str
    slots: tuple[SlotBinding, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """The graph of a kind for given shapes: activations and weights are both named inputs, no weight data inside.

    `slots` are the graph inputs that stand for weights, in graph order after `inputs`.
    """

    kind: str
    format: GraphFormat
    path: Path
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slots: tuple[TensorSpec, ...]
