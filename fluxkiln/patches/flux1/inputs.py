"""The activations that FLUX.1's parts take, with static shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.kinds import CLIP_TOKENS, KINDS, MODULATION_CHUNKS, MODULATION_ROWS
from fluxkiln.types import Configs, Shapes, TensorSpec

# input names and shapes
Sized = dict[str, tuple[int, ...]]
# kinds of split models that take what another kind takes, besides the host's constants
_SPLIT = {"t5": "t5_embed", "modulated_head": "head", "transformer": "head"}


def part_inputs(kind: str, configs: Configs, shapes: Shapes) -> tuple[TensorSpec, ...]:
    """The activations a part of `kind` takes, with static shapes, in the order of its kind's inputs."""
    kind = _SPLIT.get(kind, kind)
    if kind not in KINDS:
        raise UsageError(f"no kind of part is called {kind!r}; there are {', '.join(KINDS)}")
    component = KINDS[kind].component
    if component == "text_encoder":
        known: dict[str, Sized] = {"clip": {"input_ids": (1, CLIP_TOKENS)}}
    elif component == "text_encoder_2":
        known = _t5_inputs(configs["text_encoder_2"], shapes)
    elif component == "transformer":
        known = _transformer_inputs(configs["transformer"], shapes)
    else:
        latents: Sized = {"latents": (1, int(configs["vae"]["latent_channels"]), *shapes.latent_hw)}
        known = {"vae_decoder": latents, "tiny_vae_decoder": latents}
    dtype = "int64" if KINDS[kind].inputs == ("input_ids",) else "float32"
    return tuple(TensorSpec(name, shape, dtype) for name, shape in known[kind].items())


def _t5_inputs(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Sized]:
    text = shapes.tokens
    hidden: Sized = {"hidden_states": (1, text, int(config["d_model"]))}
    return {
        "t5_embed": {"input_ids": (1, text)},
        "t5_block": {**hidden, "position_bias": (1, int(config["num_heads"]), text, text)},
        "t5_final": hidden,
    }


def _transformer_inputs(flux: Mapping[str, Any], shapes: Shapes) -> dict[str, Sized]:
    heads, head_dim = int(flux["num_attention_heads"]), int(flux["attention_head_dim"])
    width = heads * head_dim
    text, image, joint = shapes.tokens, shapes.image_tokens, shapes.joint_tokens
    rotary: Sized = {"rotary_cos": (joint, head_dim), "rotary_sin": (joint, head_dim)}
    tokens_in: Sized = {
        "hidden_states": (1, image, int(flux["in_channels"])),
        "encoder_hidden_states": (1, text, int(flux["joint_attention_dim"])),
    }
    pooled: Sized = {"pooled_projections": (1, int(flux["pooled_projection_dim"]))}
    guided = bool(flux.get("guidance_embeds"))
    streams: Sized = {"hidden_states": (1, image, width), "encoder_hidden_states": (1, text, width)}
    rows: Sized = {"temb": (MODULATION_ROWS, width)}
    row: dict[str, Sized] = {kind: {"modulation": (1, chunks, width)} for kind, chunks in MODULATION_CHUNKS.items()}
    return {
        "head": {**tokens_in, **pooled, "timestep": (1,), **({"guidance": (1,)} if guided else {})},
        "double": {**streams, "temb": (1, width), **rotary},
        "single": {"hidden_states": (1, joint, width), "temb": (1, width), **rotary},
        "tail": {"hidden_states": (1, image, width), "temb": (1, width)},
        "time_embed": {
            **pooled,
            "timestep": (MODULATION_ROWS,),
            **({"guidance": (MODULATION_ROWS,)} if guided else {}),
        },
        "double_modulation": rows,
        "single_modulation": rows,
        "tail_modulation": rows,
        "token_embed": tokens_in,
        "double_modulated": {**streams, **row["double"], **rotary},
        "single_modulated": {"hidden_states": (1, joint, width), **row["single"], **rotary},
        "tail_modulated": {"hidden_states": (1, image, width), **row["tail"]},
    }
