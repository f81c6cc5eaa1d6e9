"""Every rewrite of upstream that FLUX.1 takes, in the order they are applied.

The wrapper modules that re-state an upstream `forward` are in `parts`, `text`, `transformer`, `modulation` and
`parallel_transformer`; the digests of what they stand for in `sources.toml`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from fluxkiln.patches.flux1.transformer import explicit_rms_norm
from fluxkiln.patches.patch import Patch

_EMBEDDINGS = "diffusers.models.embeddings"
_NORMS = "diffusers.models.normalization"
_FLUX = "diffusers.models.transformers.transformer_flux"
_VAE = "diffusers.models.autoencoders"
_CLIP = "transformers.models.clip.modeling_clip"
_T5 = "transformers.models.t5.modeling_t5"
_CUT = "never: it is where the model is cut"
_SPREAD = "never: it is what cuts the model over cores"
_SOURCES = tomllib.loads(Path(__file__).with_name("sources.toml").read_text(encoding="utf-8"))


def _known(*functions: str) -> dict[str, dict[str, str]]:
    """Upstream function -> sha256 of its source -> the version it was checked with."""
    return {name: {found[name]: version for version, found in _SOURCES.items() if name in found} for name in functions}


_TRANSFORMER = (
    Patch(
        name="head",
        replaces=_known(
            f"{_FLUX}.FluxTransformer2DModel.forward",
            f"{_EMBEDDINGS}.get_timestep_embedding",
            f"{_EMBEDDINGS}.CombinedTimestepGuidanceTextProjEmbeddings.forward",
            f"{_EMBEDDINGS}.CombinedTimestepTextProjEmbeddings.forward",
        ),
        reason="one kind of part; scaling by 1000 inside, as upstream does; frequencies are constants, bit for bit",
        until=_CUT,
        kinds=("head", "time_embed", "token_embed"),
    ),
    Patch(
        name="host_rotary",
        replaces=_known(
            f"{_FLUX}.FluxPosEmbed.forward",
            "diffusers.pipelines.flux.pipeline_flux.FluxPipeline._prepare_latent_image_ids",
            f"{_EMBEDDINGS}.apply_rotary_emb",
        ),
        reason="float64 sinusoids of the positions are constants per size: computed once on the host, passed in",
        until="never: no accelerator computes float64",
        kinds=("double", "single", "double_modulated", "single_modulated"),
    ),
    Patch(
        name="double_block",
        replaces=_known(
            f"{_FLUX}.FluxTransformerBlock.forward",
            f"{_FLUX}.FluxAttnProcessor.__call__",
            "diffusers.models.attention.FeedForward.forward",
            f"{_NORMS}.AdaLayerNormZero.forward",
        ),
        reason="norm and RoPE per stream, values joined before the head split, feed-forward in two halves",
        until="TPU-MLIR schedules the upstream form as fast",
        kinds=("double", "double_modulated"),
    ),
    Patch(
        name="single_block",
        replaces=_known(
            f"{_FLUX}.FluxSingleTransformerBlock.forward",
            f"{_FLUX}.FluxAttnProcessor.__call__",
            f"{_NORMS}.AdaLayerNormZeroSingle.forward",
        ),
        reason="joint sequence in and out; one output matmul per input instead of a concatenation, MLP in two halves",
        until="TPU-MLIR schedules the upstream form as fast",
        kinds=("single", "single_modulated"),
    ),
    Patch(
        name="tail",
        replaces=_known(f"{_FLUX}.FluxTransformer2DModel.forward", f"{_NORMS}.AdaLayerNormContinuous.forward"),
        reason="one kind of part",
        until=_CUT,
        kinds=("tail", "tail_modulated"),
    ),
)
_T5_BLOCKS = Patch(
    name="t5_position_bias_input",
    replaces=_known(
        f"{_T5}.T5Stack.forward",
        f"{_T5}.T5Block.forward",
        f"{_T5}.T5LayerSelfAttention.forward",
        f"{_T5}.T5Attention.forward",
        f"{_T5}.T5DenseGatedActDense.forward",
        "transformers.activations.NewGELUActivation.forward",
        f"{_T5}.T5LayerFF.forward",
        f"{_T5}.T5LayerNorm.forward",
    ),
    reason="one kind for all blocks, the bias of the length computed on the host; GELU spelt so that it stays tanh",
    until="never: it is what makes the blocks one kind",
    kinds=("t5_embed", "t5_block", "t5_final"),
)
PARALLEL_TRANSFORMER = tuple(
    Patch(
        name=f"parallel_{patch.name}",
        replaces=patch.replaces,
        reason="each rank computes its share of heads, MLP and modulation; the form of the compiler's own parts else",
        until=_SPREAD,
        kinds=tuple(f"parallel_{kind}" for kind in patch.kinds if kind in ("head", "double", "single", "tail")),
    )
    for patch in _TRANSFORMER
)
PARALLEL_TEXT = (
    Patch(
        name="parallel_t5",
        replaces={
            **_T5_BLOCKS.replaces,
            **_known(f"{_T5}.T5Attention._relative_position_bucket", f"{_T5}.T5Attention.compute_bias"),
        },
        reason="each rank computes its share of heads and MLP; the table's rows are chosen by the host",
        until=_SPREAD,
        kinds=("parallel_t5",),
    ),
)
PATCHES = (
    Patch(
        name="explicit_rms_norm",
        replaces=_known("torch.nn.functional.rms_norm", "torch.nn.RMSNorm.forward"),
        reason="the TorchScript exporter has no symbolic for aten::rms_norm",
        until="TPU-MLIR reads opset 23 graphs of the dynamo exporter",
        kinds=("double", "single", "double_modulated", "single_modulated"),
        replacement={"torch.nn.functional.rms_norm": explicit_rms_norm},
        formats=("onnx17", "torchscript"),
    ),
    *_TRANSFORMER,
    Patch(
        name="hoisted_modulation",
        replaces=_known(
            f"{_FLUX}.FluxTransformer2DModel.forward",
            f"{_NORMS}.AdaLayerNormZero.forward",
            f"{_NORMS}.AdaLayerNormZeroSingle.forward",
            f"{_NORMS}.AdaLayerNormContinuous.forward",
        ),
        reason="what depends on the time alone is computed once per image for all steps, and its weights released",
        until=_CUT,
        kinds=(
            *("time_embed", "token_embed", "double_modulation", "single_modulation", "tail_modulation"),
            *("double_modulated", "single_modulated", "tail_modulated"),
        ),
    ),
    Patch(
        name="finite_clip_mask",
        replaces=_known(
            f"{_CLIP}.CLIPTextModel.forward",
            f"{_CLIP}.CLIPTextEmbeddings.forward",
            f"{_CLIP}.CLIPAttention.forward",
            f"{_CLIP}.CLIPEncoderLayer.forward",
        ),
        reason="the dtype's minimum as mask value overflows in TPU-MLIR; the pooled row is picked on the host",
        until="TPU-MLIR takes infinite masks",
        kinds=("clip",),
    ),
    _T5_BLOCKS,
    Patch(
        name="vae_decoder",
        replaces=_known(f"{_VAE}.autoencoder_kl.AutoencoderKL._decode", f"{_VAE}.vae.Decoder.forward"),
        reason="one kind of part, without slicing and tiling",
        until=_CUT,
        kinds=("vae_decoder",),
    ),
    Patch(
        name="tiny_vae_decoder",
        replaces=_known(f"{_VAE}.autoencoder_tiny.AutoencoderTiny.decode", f"{_VAE}.vae.DecoderTiny.forward"),
        reason="one kind of part, without slicing and tiling",
        until=_CUT,
        kinds=("tiny_vae_decoder",),
    ),
    *PARALLEL_TRANSFORMER,
    *PARALLEL_TEXT,
)
