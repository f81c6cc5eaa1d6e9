"""The component list: what FLUX.1 is made of, which parts each component is cut into, and the names of their tensors.

Shape suffix legend used across the package:
    B = batch (always 1), S = image tokens, T = text tokens, J = T + S (joint sequence, text first),
    D = transformer width, H = attention heads, K = head width, C = latent channels, P = pooled projection width,
    M = MODULATION_ROWS.

The transformer comes in two forms. `inline`: head, blocks and tail, all run at every step. `hoisted`: what depends on
timestep, guidance and pooled prompt alone is in parts of their own that run once per image for all its steps, one row
a step; blocks and tail take the row of their step as an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fluxkiln.errors import ShapeError, UsageError

Component = Literal["text_encoder", "text_encoder_2", "transformer", "vae"]
Variant = Literal["dev", "schnell"]
Modulation = Literal["inline", "hoisted"]

COMPONENTS: tuple[Component, ...] = ("text_encoder", "text_encoder_2", "transformer", "vae")
MAX_TOKENS: Mapping[Variant, int] = {"dev": 512, "schnell": 256}
CLIP_TOKENS = 77
SIZE_MULTIPLE = 16
# Denoising steps that the hoisted parts take at once; rows beyond an image's number of steps are padding.
MODULATION_ROWS = 64
# Rows of modulation that upstream's AdaLN linears give: shift, scale, gate of attention, then of the feed-forward, and
# this for the image and for the text; shift, scale, gate; scale, shift.
MODULATION_CHUNKS: Mapping[str, int] = {"double": 12, "single": 3, "tail": 2}
MODULATION_KINDS = ("double_modulation", "single_modulation", "tail_modulation")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of part: compiled once, cast for every part of the kind.

    Attributes:
        residual: output -> the input it is a residual update of; parity is judged on their difference.
        rows: inputs whose first axis is an image's steps, MODULATION_ROWS of them, as is that of all outputs then.
    """

    name: str
    component: Component
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    residual: tuple[tuple[str, str], ...] = ()
    rows: tuple[str, ...] = ()

    @property
    def each_step(self) -> bool:
        """Whether its parts run at every denoising step; the others run once per image."""
        return self.component == "transformer" and not self.rows


_ROTARY = ("rotary_cos", "rotary_sin")
_HIDDEN = ("hidden_states_out", "hidden_states")
_TEXT = ("encoder_hidden_states_out", "encoder_hidden_states")

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("clip", "text_encoder", ("input_ids",), ("last_hidden_state",)),
        Kind("t5_embed", "text_encoder_2", ("input_ids",), ("hidden_states_out",)),
        Kind(
            "t5_block",
            "text_encoder_2",
            ("hidden_states", "position_bias"),
            ("hidden_states_out",),
            residual=(_HIDDEN,),
        ),
        Kind("t5_final", "text_encoder_2", ("hidden_states",), ("last_hidden_state",)),
        Kind(
            "head",
            "transformer",
            ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance"),
            ("hidden_states_out", "encoder_hidden_states_out", "temb"),
        ),
        Kind(
            "double",
            "transformer",
            ("hidden_states", "encoder_hidden_states", "temb", *_ROTARY),
            ("hidden_states_out", "encoder_hidden_states_out"),
            residual=(_HIDDEN, _TEXT),
        ),
        Kind(
            "single",
            "transformer",
            ("hidden_states", "temb", *_ROTARY),
            ("hidden_states_out",),
            residual=(_HIDDEN,),
        ),
        Kind("tail", "transformer", ("hidden_states", "temb"), ("sample",)),
        Kind(
            "time_embed",
            "transformer",
            ("pooled_projections", "timestep", "guidance"),
            ("temb",),
            rows=("timestep", "guidance"),
        ),
        Kind("double_modulation", "transformer", ("temb",), ("modulation",), rows=("temb",)),
        Kind("single_modulation", "transformer", ("temb",), ("modulation",), rows=("temb",)),
        Kind("tail_modulation", "transformer", ("temb",), ("modulation",), rows=("temb",)),
        Kind(
            "token_embed",
            "transformer",
            ("hidden_states", "encoder_hidden_states"),
            ("hidden_states_out", "encoder_hidden_states_out"),
        ),
        Kind(
            "double_modulated",
            "transformer",
            ("hidden_states", "encoder_hidden_states", "modulation", *_ROTARY),
            ("hidden_states_out", "encoder_hidden_states_out"),
            residual=(_HIDDEN, _TEXT),
        ),
        Kind(
            "single_modulated",
            "transformer",
            ("hidden_states", "modulation", *_ROTARY),
            ("hidden_states_out",),
            residual=(_HIDDEN,),
        ),
        Kind("tail_modulated", "transformer", ("hidden_states", "modulation"), ("sample",)),
        Kind("vae_decoder", "vae", ("latents",), ("image",)),
        Kind("tiny_vae_decoder", "vae", ("latents",), ("image",)),
    )
}

_TIMES = ("pooled_projections", "timestep", "guidance")
# Kinds that exist only where a model is cut over the cores of one accelerator. Blocks and tail are the hoisted form's,
# a part of several blocks has the kind of one.
SPLIT_KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("t5", "text_encoder_2", ("input_ids", "position_buckets"), ("last_hidden_state",)),
        Kind(
            "modulated_head",
            "transformer",
            ("hidden_states", "encoder_hidden_states", *_TIMES),
            ("hidden_states_out", "encoder_hidden_states_out", "modulation"),
        ),
        Kind(
            "transformer",
            "transformer",
            ("hidden_states", "encoder_hidden_states", *_TIMES, *_ROTARY),
            ("sample",),
        ),
    )
}


def find_kind(name: str) -> Kind:
    """The kind called `name`, of a whole or of a split model; UsageError with the legal names otherwise."""
    known = {**KINDS, **SPLIT_KINDS}
    if name not in known:
        raise UsageError(f"no kind of part is called {name!r}; there are {', '.join(known)}")
    return known[name]


@dataclass(frozen=True, slots=True)
class Part:
    """One unit of compilation. `prefix` is where its tensors start in the component's state dict."""

    name: str
    kind: str
    prefix: str = ""

    @property
    def component(self) -> Component:
        return find_kind(self.kind).component


@dataclass(frozen=True, slots=True)
class Shapes:
    """Static shapes of a build.

    Raises:
        ShapeError: a side is no positive multiple of 16, or there are no tokens.
    """

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
    def image_tokens(self) -> int:
        return (self.height // SIZE_MULTIPLE) * (self.width // SIZE_MULTIPLE)

    @property
    def joint_tokens(self) -> int:
        return self.tokens + self.image_tokens

    @property
    def latent_hw(self) -> tuple[int, int]:
        """Height and width of the unpacked latents; the VAE enlarges them 8 times."""
        return self.height // 8, self.width // 8

    def check_variant(self, variant: Variant) -> None:
        """Raise ShapeError when `variant` cannot take this many text tokens."""
        limit = MAX_TOKENS[variant]
        if self.tokens > limit:
            raise ShapeError(
                f"{self.tokens} text tokens: FLUX.1-{variant} was trained with at most {limit}; use TOKENS={limit}"
            )


def list_parts(
    configs: Mapping[str, Mapping[str, Any]], vae: Literal["kl", "tiny"] = "kl", modulation: Modulation = "inline"
) -> tuple[Part, ...]:
    """All parts of a pipeline in the order they run.

    Args:
        configs: each component's `config.json`, keyed by its folder name.
        vae: `kl` for the checkpoint's own decoder, `tiny` for taef1.
        modulation: the transformer's form. Blocks and tail are called the same in both, their kinds differ.

    Raises:
        UsageError: no such form.
    """
    if modulation not in ("inline", "hoisted"):
        raise UsageError(f"no form of the transformer is called {modulation!r}; there are inline, hoisted")
    parts = [Part("clip", "clip"), Part("t5_embed", "t5_embed")]
    for i in range(int(configs["text_encoder_2"]["num_layers"])):
        parts.append(Part(f"t5_block.{i:02d}", "t5_block", f"encoder.block.{i}."))
    parts.append(Part("t5_final", "t5_final", "encoder.final_layer_norm."))
    blocks = [
        *_blocks("double", "transformer_blocks", int(configs["transformer"]["num_layers"])),
        *_blocks("single", "single_transformer_blocks", int(configs["transformer"]["num_single_layers"])),
        Part("tail", "tail"),
    ]
    if modulation == "inline":
        parts += [Part("head", "head"), *blocks]
    else:
        parts.append(Part("time_embed", "time_embed"))
        parts += [Part(modulation_name(part), f"{part.kind}_modulation", part.prefix) for part in blocks]
        parts.append(Part("token_embed", "token_embed"))
        parts += [Part(part.name, f"{part.kind}_modulated", part.prefix) for part in blocks]
    vae_kind = "vae_decoder" if vae == "kl" else "tiny_vae_decoder"
    parts.append(Part(vae_kind, vae_kind, "decoder."))
    return tuple(parts)


def _blocks(kind: str, folder: str, count: int) -> list[Part]:
    return [Part(f"{kind}.{i:02d}", kind, f"{folder}.{i}.") for i in range(count)]


def modulation_name(part: Part) -> str:
    """The part that computes the modulation of `part`, a block or the tail: `double.07` -> `double_modulation.07`."""
    base, dot, number = part.name.partition(".")
    return f"{base}_modulation{dot}{number}"


def check_steps(parts: tuple[Part, ...], steps: int) -> None:
    """Raise UsageError when hoisted parts are asked for more steps than they have rows."""
    if steps > MODULATION_ROWS and any(find_kind(part.kind).rows for part in parts):
        raise UsageError(
            f"{steps} steps: the hoisted modulation is computed for at most {MODULATION_ROWS} at once; use at most "
            f"{MODULATION_ROWS} steps, or the inline form"
        )


def find_part(parts: tuple[Part, ...], name: str) -> Part:
    """The part called `name`; UsageError with the legal names otherwise."""
    for part in parts:
        if part.name == name:
            return part
    raise UsageError(f"no part is called {name!r}; this model has {', '.join(part.name for part in parts)}")
