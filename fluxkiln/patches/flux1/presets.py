"""Synthetic presets as data: FLUX.1's configs, at its own size or smaller, otherwise unchanged."""

from __future__ import annotations

from collections.abc import Mapping

from fluxkiln.patches.model import Config, Preset

# Raise when synth writes other bytes for the same preset and seed: caches of synthetic checkpoints are keyed by it.
GENERATOR = 2


def _clip(hidden: int, layers: int, heads: int, intermediate: int, vocab: int) -> Config:
    # eos_token_id 2 is FLUX.1's own: transformers then pools at the highest token id, which is the end token.
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": hidden,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": hidden,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }


def _t5(d_model: int, layers: int, heads: int, d_ff: int, vocab: int) -> Config:
    return {
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": d_ff,
        "d_kv": 64,
        "d_model": d_model,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": layers,
        "num_heads": heads,
        "num_layers": layers,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
    }


def _transformer(double: int, single: int, heads: int, joint: int, pooled: int, variant: str) -> Config:
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.42.1",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": variant == "dev",
        "in_channels": 64,
        "joint_attention_dim": joint,
        "num_attention_heads": heads,
        "num_layers": double,
        "num_single_layers": single,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": pooled,
    }


def _vae(widths: tuple[int, int, int, int], layers: int) -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "block_out_channels": list(widths),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": layers,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _tiny_vae(width: int, blocks: tuple[int, int, int, int]) -> Config:
    return {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": "0.42.1",
        "act_fn": "relu",
        "decoder_block_out_channels": [width] * 4,
        "encoder_block_out_channels": [width] * 4,
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": 16,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": list(blocks),
        "num_encoder_blocks": list(reversed(blocks)),
        "out_channels": 3,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }


def _scheduler(variant: str) -> Config:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.42.1",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0 if variant == "dev" else 1.0,
        "use_dynamic_shifting": variant == "dev",
    }


def _tiny(name: str, variant: str) -> Preset:
    return Preset(
        name,
        f"2 double + 3 single blocks of width 256, like FLUX.1-{variant} otherwise",
        variant,
        size=(32, 32),
        tokens=16,
        configs={
            "scheduler": _scheduler(variant),
            "text_encoder": _clip(hidden=64, layers=2, heads=2, intermediate=128, vocab=768),
            "text_encoder_2": _t5(d_model=128, layers=2, heads=2, d_ff=256, vocab=384),
            "transformer": _transformer(double=2, single=3, heads=2, joint=128, pooled=64, variant=variant),
            "vae": _vae((32, 32, 32, 32), layers=1),
            "vae_tiny": _tiny_vae(32, (1, 1, 1, 1)),
        },
    )


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        _tiny("tiny-dev", "dev"),
        _tiny("tiny-schnell", "schnell"),
        Preset(
            "wide-dev",
            "1 double + 1 single block of FLUX.1's true width 3072, small encoders and VAE",
            "dev",
            size=(256, 256),
            tokens=128,
            configs={
                "scheduler": _scheduler("dev"),
                "text_encoder": _clip(hidden=768, layers=1, heads=12, intermediate=768, vocab=768),
                "text_encoder_2": _t5(d_model=4096, layers=1, heads=4, d_ff=512, vocab=384),
                "transformer": _transformer(double=1, single=1, heads=24, joint=4096, pooled=768, variant="dev"),
                "vae": _vae((32, 32, 32, 32), layers=1),
                "vae_tiny": _tiny_vae(32, (1, 1, 1, 1)),
            },
        ),
        Preset(
            "full-dev",
            "all 19 double + 38 single blocks, CLIP-L, T5-XXL and VAE at FLUX.1-dev's own size (34 GB)",
            "dev",
            size=(1024, 1024),
            tokens=512,
            configs={
                "scheduler": _scheduler("dev"),
                "text_encoder": _clip(hidden=768, layers=12, heads=12, intermediate=3072, vocab=49408),
                "text_encoder_2": _t5(d_model=4096, layers=24, heads=64, d_ff=10240, vocab=32128),
                "transformer": _transformer(double=19, single=38, heads=24, joint=4096, pooled=768, variant="dev"),
                "vae": _vae((128, 256, 512, 512), layers=2),
                "vae_tiny": _tiny_vae(64, (3, 3, 3, 1)),
            },
        ),
    )
}
