"""What the configs of a FLUX.1 checkpoint must hold: types and ranges of every key that is read here or upstream.

The ranges are wide: twenty times FLUX.1's own depth and width. They keep a number that nobody means from becoming a
model that no machine holds. A key that is `NotRequired` has a default upstream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from fluxkiln.documents import check_schema
from fluxkiln.errors import CheckpointError
from fluxkiln.types import Configs

Depth = Annotated[int, Meta(ge=1, le=512)]
Width = Annotated[int, Meta(ge=1, le=1 << 16)]
Even = Annotated[int, Meta(ge=2, le=4096, multiple_of=2)]
Words = Annotated[int, Meta(ge=1, le=1 << 20)]
Token = Annotated[int, Meta(ge=0, le=1 << 20)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
# Far from where bfloat16 ends, on both sides.
Factor = Annotated[float, Meta(gt=1e-6, lt=1e6)]
Offset = Annotated[float, Meta(gt=-1e6, lt=1e6)]
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^\w+[\w. -]*$")]
Stages = Annotated[list[Width], Meta(min_length=1, max_length=8)]
Counts = Annotated[list[Depth], Meta(min_length=1, max_length=8)]
Names = Annotated[list[Name], Meta(min_length=1, max_length=8)]


class ClipKeys(TypedDict):
    vocab_size: Words
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Depth
    num_attention_heads: Width
    max_position_embeddings: Width
    hidden_act: NotRequired[Name]
    layer_norm_eps: NotRequired[Fraction]
    attention_dropout: NotRequired[Fraction]
    projection_dim: NotRequired[Width]
    initializer_factor: NotRequired[Factor]
    bos_token_id: NotRequired[Token | None]
    eos_token_id: NotRequired[Token | None]
    pad_token_id: NotRequired[Token | None]


class T5Keys(TypedDict):
    vocab_size: Words
    d_model: Width
    d_kv: Width
    d_ff: Width
    num_layers: Depth
    num_heads: Width
    num_decoder_layers: NotRequired[Depth | None]
    relative_attention_num_buckets: NotRequired[Annotated[int, Meta(ge=2, le=4096)]]
    relative_attention_max_distance: NotRequired[Annotated[int, Meta(ge=2, le=1 << 20)]]
    feed_forward_proj: Name
    layer_norm_epsilon: NotRequired[Fraction]
    dropout_rate: NotRequired[Fraction]
    initializer_factor: NotRequired[Factor]
    eos_token_id: NotRequired[Token | None]
    pad_token_id: NotRequired[Token | None]


class TransformerKeys(TypedDict):
    patch_size: NotRequired[Literal[1]]
    in_channels: Width
    out_channels: NotRequired[Width | None]
    num_layers: Depth
    num_single_layers: Depth
    attention_head_dim: Even
    num_attention_heads: Annotated[int, Meta(ge=1, le=1024)]
    joint_attention_dim: Width
    pooled_projection_dim: Width
    guidance_embeds: bool
    axes_dims_rope: NotRequired[Annotated[list[Even], Meta(min_length=3, max_length=3)]]


class VaeKeys(TypedDict):
    in_channels: NotRequired[Width]
    out_channels: NotRequired[Width]
    latent_channels: Width
    block_out_channels: Stages
    layers_per_block: NotRequired[Depth]
    norm_num_groups: NotRequired[Width]
    down_block_types: NotRequired[Names]
    up_block_types: NotRequired[Names]
    act_fn: NotRequired[Name]
    scaling_factor: Factor
    shift_factor: Offset
    sample_size: NotRequired[Width]
    use_quant_conv: NotRequired[bool]
    use_post_quant_conv: NotRequired[bool]
    mid_block_add_attention: NotRequired[bool]
    force_upcast: NotRequired[bool | float]


class TinyVaeKeys(TypedDict):
    in_channels: NotRequired[Width]
    out_channels: NotRequired[Width]
    latent_channels: Width
    encoder_block_out_channels: Stages
    decoder_block_out_channels: Stages
    num_encoder_blocks: Counts
    num_decoder_blocks: Counts
    act_fn: NotRequired[Name]
    upsample_fn: NotRequired[Name]
    upsampling_scaling_factor: NotRequired[Annotated[int, Meta(ge=1, le=16)]]
    latent_magnitude: NotRequired[Factor]
    latent_shift: NotRequired[Offset]
    scaling_factor: NotRequired[Factor]
    shift_factor: NotRequired[Offset]
    force_upcast: NotRequired[bool | float]


class SchedulerKeys(TypedDict):
    _class_name: Literal["FlowMatchEulerDiscreteScheduler"]
    num_train_timesteps: NotRequired[Annotated[int, Meta(ge=1, le=1_000_000)]]
    shift: NotRequired[Factor]
    use_dynamic_shifting: NotRequired[bool]
    base_shift: NotRequired[Factor]
    max_shift: NotRequired[Factor]
    base_image_seq_len: NotRequired[Annotated[int, Meta(ge=1, le=1 << 24)]]
    max_image_seq_len: NotRequired[Annotated[int, Meta(ge=1, le=1 << 24)]]
    shift_terminal: NotRequired[Fraction | None]
    invert_sigmas: NotRequired[bool]
    stochastic_sampling: NotRequired[bool]
    time_shift_type: NotRequired[Literal["exponential", "linear"]]
    use_karras_sigmas: NotRequired[bool | None]
    use_exponential_sigmas: NotRequired[bool | None]
    use_beta_sigmas: NotRequired[bool | None]


SCHEMAS: Mapping[str, Any] = {
    "text_encoder": ClipKeys,
    "text_encoder_2": T5Keys,
    "transformer": TransformerKeys,
    "vae": VaeKeys,
    "vae_tiny": TinyVaeKeys,
    "scheduler": SchedulerKeys,
}

ROPE_AXES = (16, 56, 56)  # diffusers' default, which FLUX.1's own config does not repeat
# of the scheduler's config: what no FLUX.1 asks for, and `scheduler.py` does not compute
OTHER_SCHEDULES = (
    "invert_sigmas", "shift_terminal", "stochastic_sampling", "use_beta_sigmas", "use_exponential_sigmas",
    "use_flow_sigmas", "use_karras_sigmas",
)  # fmt: skip
# the shift of any image: of one token, and of 8192x8192 pixels; e to the power of it is a float32
SHIFTED_TOKENS, MOST_SHIFT = (1, 1 << 18), 80.0
_REMEDY = "copy or fetch it again"


def check_configs(configs: Configs, where: str) -> None:
    """Compare configs with the schemas, and with one another.

    Args:
        configs: by folder, the scheduler's too; those that are there. where: the checkpoint or bundle, for messages.

    Raises:
        CheckpointError: the first key that is missing or not legal, or two that contradict each other.
    """
    for folder, schema in SCHEMAS.items():
        if folder in configs:
            name = f"{where}: {folder}'s config"
            check_schema(configs[folder], schema, name, error=CheckpointError, remedy=_REMEDY)
    if asked := [key for key in OTHER_SCHEDULES if configs.get("scheduler", {}).get(key)]:
        raise CheckpointError(
            f"{where}: scheduler's config asks for {', '.join(asked)}, which no FLUX.1 does and nothing here computes; "
            "take the scheduler of the published model"
        )
    if "scheduler" in configs:
        _check_shifts(configs["scheduler"], where)
    for one, first, other, second in _equal(configs):
        if first != second:
            raise CheckpointError(
                f"{where}: {one} is {first} and {other} is {second}, which must be equal; the configs are of different "
                f"models: {_REMEDY}"
            )


def _check_shifts(scheduler: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError where a schedule is shifted by what is no number, or by more than one can be."""
    from fluxkiln.patches.flux1.scheduler import shift_for

    try:
        shifts = [shift_for(scheduler, tokens) for tokens in SHIFTED_TOKENS]
    except ZeroDivisionError:
        shifts = [math.nan]
    least = 0 if scheduler.get("time_shift_type") == "linear" else -MOST_SHIFT
    if not all(least < shift < MOST_SHIFT for shift in shifts):
        told = " to ".join(f"{one:.4g}" for one in shifts)
        raise CheckpointError(
            f"{where}: scheduler's config shifts the schedule of images by {told}, it must be from {least:g} to "
            f"{MOST_SHIFT:g}; take the scheduler of the published model"
        )


def _equal(configs: Configs) -> Iterator[tuple[str, int, str, int]]:
    """What must be equal in the configs that are there: name and value of the one, name and value of the other."""
    clip, t5, flux, vae = (configs.get(name) for name in ("text_encoder", "text_encoder_2", "transformer", "vae"))
    if clip:
        width, heads = clip["hidden_size"], clip["num_attention_heads"]
        yield "CLIP's hidden_size", width, "the width of its heads together", width // heads * heads
    if flux:
        axes = sum(flux.get("axes_dims_rope", ROPE_AXES))
        yield "the transformer's attention_head_dim", flux["attention_head_dim"], "the sum of its axes_dims_rope", axes
        if clip:
            yield "pooled_projection_dim", flux["pooled_projection_dim"], "CLIP's hidden_size", clip["hidden_size"]
        if t5:
            yield "joint_attention_dim", flux["joint_attention_dim"], "T5's d_model", t5["d_model"]
        if vae:
            yield "in_channels", flux["in_channels"], "4 times the VAE's latent_channels", 4 * vae["latent_channels"]
    if vae:
        groups, widths = vae.get("norm_num_groups", 32), vae["block_out_channels"]
        for width in widths:
            yield "a width of block_out_channels", width, "its norm_num_groups together", width // groups * groups
        for key in ("down_block_types", "up_block_types"):
            yield f"the length of {key}", len(vae.get(key, widths)), "that of block_out_channels", len(widths)
