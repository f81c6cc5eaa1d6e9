"""The VAE decoders as parts: latents [1, C, h, w] -> image [1, 3, 8h, 8w].

Stands for `AutoencoderKL._decode` and `AutoencoderTiny.decode` (checked with diffusers 0.42.1) without slicing and
tiling. FLUX.1's VAE has no `post_quant_conv`; a checkpoint that has one is refused when its module is built.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fluxkiln.patches.patch import Patch

_CHECKED = "diffusers 0.42.1"


class VaeDecoderPart(nn.Module):
    """Either decoder: latents already un-scaled and un-shifted -> image in -1..1."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.block = decoder

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.block(latents)
        return image


PATCHES = (
    Patch(
        name="vae_decoder",
        replaces={
            "diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL._decode": {
                "7d83fa9b65798267a4cc71141f0019e922bedbd7976e718f783750e8cb6030d5": _CHECKED
            },
            "diffusers.models.autoencoders.vae.Decoder.forward": {
                "be96bf1aec1d895a8af9bc0167c2d528aa57c382f558964cc4405a1e4c1db14c": _CHECKED
            },
        },
        reason="one kind of part, without slicing and tiling",
        until="never: it is where the model is cut",
        kinds=("vae_decoder",),
    ),
    Patch(
        name="tiny_vae_decoder",
        replaces={
            "diffusers.models.autoencoders.autoencoder_tiny.AutoencoderTiny.decode": {
                "2707f360b25aeae8e07559b7f1f832be60b1aa0c1f88b9324b6efaf8e9479cb9": _CHECKED
            },
            "diffusers.models.autoencoders.vae.DecoderTiny.forward": {
                "a0e3180d1ad14c778bff50b6f69500430891fcc897d97bcf63093248a11f5cc1": _CHECKED
            },
        },
        reason="one kind of part, without slicing and tiling",
        until="never: it is where the model is cut",
        kinds=("tiny_vae_decoder",),
    ),
)
