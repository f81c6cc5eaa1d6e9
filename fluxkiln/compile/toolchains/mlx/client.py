"""What mflux makes of the files of one component, in the environment that has it.

client.py names FOLDER NUMBERS.npz OUT.json: the first axis of the checkpoint's tensors, numbered, by mflux's own
table of names; and the tensors of FOLDER that mflux's class has not, or in another shape, and those that it lacks.
client.py run FOLDER INPUTS.npz OUT.npz: the transformer's output. FOLDER is the component's, in a folder with others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mflux.models.common.config import ModelConfig
from mflux.models.common.weights.loading.loaded_weights import LoadedWeights, MetaData
from mflux.models.common.weights.loading.weight_applier import WeightApplier
from mflux.models.common.weights.loading.weight_loader import WeightLoader
from mflux.models.common.weights.mapping.weight_mapper import WeightMapper
from mflux.models.flux.weights.flux_weight_definition import FluxWeightDefinition
from mlx.utils import tree_flatten


def build_module(component: Any, weights: LoadedWeights) -> Any:
    """mflux's module of a component, as many blocks as the weights have."""
    if component.name == "transformer":
        from mflux.models.flux.model.flux_transformer.transformer import Transformer

        guided = any("guidance" in name for name, _ in tree_flatten(weights.components[component.name]))
        config = ModelConfig.dev() if guided else ModelConfig.schnell()
        return Transformer(config, weights.num_transformer_blocks(), weights.num_single_transformer_blocks())
    if component.name == "vae":
        from mflux.models.flux.model.flux_vae.vae import VAE

        return VAE()
    if component.name == "t5_encoder":
        from mflux.models.flux.model.flux_text_encoder.t5_encoder.t5_encoder import T5Encoder

        return T5Encoder()
    from mflux.models.flux.model.flux_text_encoder.clip_encoder.clip_encoder import CLIPEncoder

    return CLIPEncoder()


def open_component(folder: Path) -> tuple[Any, Any, LoadedWeights]:
    """Of a folder: what mflux says of it, its module structured for the weights but without them, and the weights."""
    (component,) = (one for one in FluxWeightDefinition.get_components() if one.hf_subdir == folder.name)
    tree, level, version = WeightLoader._try_load_mflux_format(folder)
    if tree is None:
        raise SystemExit(f"mflux takes {folder} for no folder of its own")
    weights = LoadedWeights({component.name: tree}, MetaData(level, version))
    model = build_module(component, weights)
    if level is not None:
        WeightApplier._quantize(
            {component.name: model}, level, {component.name: component}, FluxWeightDefinition, weights=weights
        )
    return component, model, weights


def main() -> None:
    command, folder, given, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    component, model, weights = open_component(folder)
    if command == "names":
        numbers = {name: mx.array(rows) for name, rows in np.load(given).items()}
        mapped = WeightMapper.apply_mapping(
            numbers, component.mapping_getter(), num_blocks=component.num_blocks, num_layers=component.num_layers
        )
        has = {name: list(one.shape) for name, one in tree_flatten(weights.components[component.name])}
        wants = {name: list(one.shape) for name, one in tree_flatten(model.parameters())}
        odd = sorted(name for name in has.keys() | wants.keys() if has.get(name) != wants.get(name))
        rows = {name: np.array(one).reshape(-1).tolist() for name, one in tree_flatten(mapped)}
        Path(out).write_text(json.dumps({"rows": rows, "odd": odd}))
        return
    model.update(weights.components[component.name], strict=False)
    inputs = np.load(given)
    scheduler = SimpleNamespace(sigmas=mx.array(inputs["sigma"]))
    config = SimpleNamespace(
        scheduler=scheduler, num_train_steps=1000, precision=ModelConfig.precision,
        guidance=float(inputs["guidance"]), height=int(inputs["height"]), width=int(inputs["width"]),
    )  # fmt: skip
    arrays = {name: mx.array(inputs[name]).astype(ModelConfig.precision)
              for name in ("hidden_states", "prompt_embeds", "pooled_prompt_embeds")}  # fmt: skip
    np.savez(out, sample=np.array(model(t=0, config=config, **arrays).astype(mx.float32)))


if __name__ == "__main__":
    main()
