"""What FLUX.1's parts take: activations with static shapes, and what the host computes once per shape: RoPE's cos and
sin, T5's position bias, the row that CLIP pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.kinds import ALL_KINDS, CLIP_TOKENS, CONSTANT_INPUTS, KINDS, MODULATION_CHUNKS, SPLIT_KINDS
from fluxkiln.patches.model import ReadTensor
from fluxkiln.types import Configs, Kind, Shapes, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# of the angles of positions
THETA = 10000
T5_BIAS_TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def part_inputs(kind: str, configs: Configs, shapes: Shapes) -> tuple[TensorSpec, ...]:
    """The activations a part of `kind` takes, with static shapes, in the order of its kind's inputs.

    Kinds of split models are listed without the host's constants.
    """
    if kind not in ALL_KINDS:
        raise UsageError(f"no kind of part is called {kind!r}; there are {', '.join(KINDS)}")
    found = input_shapes(ALL_KINDS[kind], configs, shapes)
    if kind in SPLIT_KINDS:
        found = {name: shape for name, shape in found.items() if name not in CONSTANT_INPUTS}
    dtype = "int64" if "input_ids" in found else "float32"
    return tuple(TensorSpec(name, shape, dtype) for name, shape in found.items())


def input_shapes(kind: Kind, configs: Configs, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Input -> its shape, in the order of the kind's inputs; guidance only where the model embeds it."""
    text, image, joint = shapes.tokens, shapes.image_tokens, shapes.joint_tokens
    known: dict[str, tuple[int, ...]]
    if kind.component == "text_encoder":
        known = {"input_ids": (1, CLIP_TOKENS)}
    elif kind.component == "text_encoder_2":
        t5 = configs["text_encoder_2"]
        known = {
            "input_ids": (1, text),
            "hidden_states": (1, text, int(t5["d_model"])),
            "position_bias": (1, int(t5["num_heads"]), text, text),
            "position_buckets": (text, text),
        }
    elif kind.component == "transformer":
        flux = configs["transformer"]
        head_dim = int(flux["attention_head_dim"])
        width, rows = int(flux["num_attention_heads"]) * head_dim, kind.most_rows or 1
        # blocks and tail are told of the step, and take what the embedders made
        embedded = "temb" in kind.inputs or "modulation" in kind.inputs
        image_width, text_width = (
            width if embedded else int(flux[key]) for key in ("in_channels", "joint_attention_dim")
        )
        known = {
            "hidden_states": (1, joint if kind.family == "single" else image, image_width),
            "encoder_hidden_states": (1, text, text_width),
            "pooled_projections": (1, int(flux["pooled_projection_dim"])),
            "timestep": (rows,),
            **({"guidance": (rows,)} if flux.get("guidance_embeds") else {}),
            "temb": (rows, width),
            "modulation": (1, MODULATION_CHUNKS.get(kind.family, 0), width),
            "rotary_cos": (joint, head_dim),
            "rotary_sin": (joint, head_dim),
        }
    else:
        known = {"latents": (1, int(configs["vae"]["latent_channels"]), *shapes.latent_hw)}
    return {name: known[name] for name in kind.inputs if name in known}


def make_constants(configs: Configs, shapes: Shapes, read: ReadTensor, split: bool) -> dict[str, NDArray[Any]]:
    """What the host hands to the parts of the components that are there, by name.

    `rotary_cos`, `rotary_sin` [J, K] float32; of T5 `position_bias` [1, H, T, T] float32, or where the model is cut
    over ranks `position_buckets` [T, T] int32.
    """
    constants: dict[str, NDArray[Any]] = {}
    if "transformer" in configs:
        constants |= rotary_embedding(configs["transformer"], shapes)
    if "text_encoder_2" in configs and split:
        constants["position_buckets"] = position_buckets(configs["text_encoder_2"], shapes.tokens)
    elif "text_encoder_2" in configs:
        constants["position_bias"] = position_bias(configs["text_encoder_2"], shapes, read)
    return constants


def rotary_angles(config: Mapping[str, Any], shapes: Shapes) -> NDArray[Any]:
    """What `rotary_embedding` has the cosines and sines of [J, K], float64, without torch."""
    import numpy as np

    from fluxkiln.patches.flux1.schemas import ROPE_AXES

    places = np.zeros((shapes.joint_tokens, 3))
    rows, columns = np.divmod(np.arange(shapes.image_tokens), shapes.width // 16)
    places[shapes.tokens :, 1], places[shapes.tokens :, 2] = rows, columns
    angles = [
        np.repeat(np.outer(place, 1 / THETA ** (np.arange(0, width, 2) / width)), 2, axis=1)
        for place, width in zip(places.T, config.get("axes_dims_rope", ROPE_AXES), strict=True)
    ]
    joined: NDArray[Any] = np.concatenate(angles, axis=1)
    return joined


def rotary_embedding(config: Mapping[str, Any], shapes: Shapes) -> dict[str, NDArray[Any]]:
    """cos and sin [J, K] float32 of every position, text first, by diffusers' own `FluxPosEmbed` in float64.

    Source: `FluxPipeline._prepare_latent_image_ids` for the positions of the image; text stands at 0, 0, 0.
    """
    import torch
    from diffusers import FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    from fluxkiln.patches.flux1.schemas import ROPE_AXES

    rows, columns = shapes.height // 16, shapes.width // 16
    image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, torch.device("cpu"), torch.float32)
    ids = torch.cat([torch.zeros(shapes.tokens, 3), image_ids])
    cos, sin = FluxPosEmbed(theta=THETA, axes_dim=list(config.get("axes_dims_rope", ROPE_AXES)))(ids)
    return {"rotary_cos": cos.float().numpy(), "rotary_sin": sin.float().numpy()}


def position_bias(t5: Mapping[str, Any], shapes: Shapes, read: ReadTensor) -> NDArray[Any]:
    """T5's relative position bias [1, H, T, T] float32, by transformers' own bucketing from block 0's table."""
    import numpy as np
    import torch
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(**t5)
    table = read("text_encoder_2", T5_BIAS_TABLE).astype(np.float32)
    with torch.device("meta"):
        attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    attention.relative_attention_bias.weight = torch.nn.Parameter(torch.from_numpy(table), requires_grad=False)
    bias = attention.compute_bias(shapes.tokens, shapes.tokens, device=torch.device("cpu"))
    values: NDArray[Any] = bias.detach().float().numpy()
    return values


def position_buckets(config: Mapping[str, Any], tokens: int) -> NDArray[np.int32]:
    """[T, T] int32: the row of the position bias table for each query position (first axis) and key position.

    Args:
        config: `config.json` of text_encoder_2.

    Source: `T5Attention.compute_bias` of transformers; the bucketing is its own `_relative_position_bucket`.
    """
    import torch
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    t5: Any = T5Config(**config)
    position = torch.arange(tokens, device="cpu")
    buckets = T5Attention._relative_position_bucket(
        position[None, :] - position[:, None],
        bidirectional=True,
        num_buckets=t5.relative_attention_num_buckets,
        max_distance=t5.relative_attention_max_distance,
    )
    rows: NDArray[np.int32] = buckets.to(torch.int32).numpy()
    return rows


def pooled_row(input_ids: NDArray[Any], config: Mapping[str, Any]) -> int:
    """The row of CLIP's last hidden state that is the pooled output.

    Source: `CLIPTextModel.forward`: the highest token id when eos_token_id is 2 (as in FLUX.1), else the first end
    token.
    """
    ids = input_ids.reshape(-1)
    eos = int(config.get("eos_token_id", 2))
    return int(ids.argmax() if eos == 2 else (ids == eos).argmax())
