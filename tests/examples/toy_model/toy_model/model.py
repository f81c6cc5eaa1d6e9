"""What fluxkiln has to know of the toy model: where it differs from FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.model import Flux1
from fluxkiln.patches.model import API, Preset
from fluxkiln.types import Configs, Part

TINY = Flux1.presets["tiny-dev"]


class Toy(Flux1):
    """See `fluxkiln.patches.model.Model`; what is not here is as in FLUX.1."""

    api = API
    name = "toy"
    title = "Toy"
    pipeline_class = "ToyPipeline"
    classes: Mapping[str, str] = {**Flux1.classes, "transformer": "ToyTransformer2DModel"}
    libraries: Mapping[str, str] = {**Flux1.libraries, "transformer": "toy_model.published"}
    most_tokens: Mapping[str, int] = {"base": 512}
    steps: Mapping[str, int] = {"base": 8}
    presets: Mapping[str, Preset] = {
        "tiny-toy": replace(
            TINY,
            name="tiny-toy",
            summary="3 single + 2 double blocks of width 192",
            variant="base",
            configs={
                **TINY.configs,
                "transformer": {
                    **TINY.configs["transformer"],
                    "_class_name": "ToyTransformer2DModel",
                    "attention_head_dim": 64,
                    "axes_dims_rope": [16, 24, 24],
                    "num_attention_heads": 3,
                },
            },
        )
    }

    def variant(self, configs: Configs) -> str:
        return "base"

    def licence(self, text: str, variant: str) -> str:
        return "Apache-2.0"

    def load_pipeline_class(self) -> Any:
        from toy_model.published import ToyPipeline

        return ToyPipeline

    def layout(self, folder: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """FLUX.1's, with feed-forwards of twice the width in place of four times."""
        found = super().layout(folder, config)
        if folder == "transformer":
            width = config["num_attention_heads"] * config["attention_head_dim"]
            narrow = {4 * width: 2 * width, 5 * width: 3 * width}
            for name, shape in found.items():
                if ".ff" in name or ".proj_mlp." in name or ".proj_out." in name:
                    found[name] = tuple(narrow.get(size, size) for size in shape)
        return found

    def list_parts(self, configs: Configs, vae: Any, modulation: Any) -> tuple[Part, ...]:
        """FLUX.1's, single blocks before double ones."""
        parts = super().list_parts(configs, vae, modulation)
        blocks = [part for part in parts if part.traits.is_block]
        ordered = iter(sorted(blocks, key=lambda part: part.traits.family == "double"))
        return tuple(next(ordered) if part.traits.is_block else part for part in parts)

    def list_split_parts(self, configs: Configs, granularity: str, vae: Any) -> tuple[Part, ...]:
        raise UsageError("nobody has cut the toy model over ranks; choose a target that holds whole parts")


MODEL = Toy()
