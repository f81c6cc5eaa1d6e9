"""From a kind and shapes to a template: the graph with its weights as named inputs and no weight data in it.

The module lives on the meta device and its parameters are handed in as traced arguments, so that tracing costs neither
memory nor arithmetic, at any size, for every format.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.components import CLIP_TOKENS, KINDS, MODULATION_CHUNKS, MODULATION_ROWS, Shapes
from fluxkiln.errors import ExportError, UsageError
from fluxkiln.patches.flux1.parts import Configs, build_part, slot_name
from fluxkiln.patches.patch import apply_patches, patches_for
from fluxkiln.types import GraphFormat, Template, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

OPSETS: Mapping[str, int] = {"onnx17": 17, "onnx23": 23}
# these create constants while they run, and a constant made on the meta device has no value
CPU_KINDS = ("clip", "head", "time_embed")
# torch's meta convolution does not take the TorchScript tracer's shapes
CONVOLUTIONAL_KINDS = ("vae_decoder", "tiny_vae_decoder")
# convolutions cost arithmetic on the CPU, so a VAE is traced on this side of latents and its shape is set afterwards
TRACED_LATENT = 8
# input names and shapes
Sized = dict[str, tuple[int, ...]]
SUFFIXES: Mapping[str, str] = {"onnx17": ".onnx", "onnx23": ".onnx", "pt2": ".pt2", "torchscript": ".pt"}


def part_inputs(kind: str, configs: Configs, shapes: Shapes) -> tuple[TensorSpec, ...]:
    """The activations a part of `kind` takes, with static shapes, in `KINDS[kind].inputs` order."""
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


def export_template(
    kind: str, configs: Configs, shapes: Shapes, graph_format: GraphFormat, destination: Path
) -> Template:
    """Trace `kind` and write its graph to `destination` (a folder).

    Raises:
        UsageError: no such kind or format. PatchError: upstream changed. ExportError: the graph is not what it must be.
    """
    if graph_format not in SUFFIXES:
        raise UsageError(f"no graph format is called {graph_format!r}; there are {', '.join(SUFFIXES)}")
    inputs = part_inputs(kind, configs, shapes)
    path = destination / f"{kind}{SUFFIXES[graph_format]}"
    with apply_patches(patches_for(kind, graph_format)):
        module = _slots_as_inputs(build_part(kind, configs), len(inputs))
        arguments = _arguments("meta", inputs, module)
        outputs = _output_specs(kind, module, arguments)
        scripted = graph_format in ("onnx17", "torchscript")
        # torch.export computes nothing either way, but what it traced on the meta device runs nowhere else
        if kind in CPU_KINDS or graph_format == "pt2" or (kind in CONVOLUTIONAL_KINDS and scripted):
            arguments = _arguments("cpu", inputs, module)
        slots = module.slots
        with _quiet():
            if graph_format == "onnx17":
                slots = _write_onnx17(module, arguments, inputs, outputs, path)
            elif graph_format == "onnx23":
                _write_onnx23(module, arguments, inputs, outputs, path)
            elif graph_format == "pt2":
                _write_pt2(module, arguments, path)
            else:
                _write_torchscript(module, arguments, path)
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    return Template(kind, graph_format, path, digest, inputs, outputs, slots)


def configs_digest(configs: Configs) -> str:
    """sha256 over the configs in canonical JSON: what a template depends on besides shapes and code."""
    return "sha256:" + hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()


def _slots_as_inputs(module: Module, activations: int) -> Any:
    """A module that takes the part's activations and then all its weights as arguments."""
    import torch

    parameters = dict(module.named_parameters())

    class SlotsAsInputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["part"] = module  # not registered: its parameters are arguments now
            self.parameters_in_order = tuple(parameters.values())
            self.slots = tuple(
                TensorSpec(slot_name(name), tuple(parameter.shape)) for name, parameter in parameters.items()
            )

        def forward(self, *arguments: Tensor) -> Any:
            part = self.__dict__["part"]
            places = []
            for name, weight in zip(parameters, arguments[activations:], strict=True):
                owner, _, leaf = name.rpartition(".")
                place = part.get_submodule(owner)._parameters
                places.append((place, leaf, place[leaf]))
                place[leaf] = weight
            try:
                return part(*arguments[:activations])
            finally:
                for place, leaf, parameter in places:
                    place[leaf] = parameter

    return SlotsAsInputs().eval()


def _arguments(device: str, inputs: tuple[TensorSpec, ...], module: Any) -> tuple[Tensor, ...]:
    import torch

    activations = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in inputs]
    # one element seen as a whole matrix: no memory on the CPU either
    weights = [torch.ones(1, device=device).expand(spec.shape) for spec in module.slots]
    return (*activations, *weights)


def _output_specs(kind: str, module: Any, arguments: tuple[Tensor, ...]) -> tuple[TensorSpec, ...]:
    results = module(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    names = KINDS[kind].outputs
    if len(results) != len(names):
        raise ExportError(f"kind {kind} gave {len(results)} outputs, {len(names)} are declared: {', '.join(names)}")
    return tuple(TensorSpec(name, tuple(result.shape)) for name, result in zip(names, results, strict=True))


def _write_onnx17(
    module: Any,
    arguments: tuple[Tensor, ...],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    path: Path,
) -> tuple[TensorSpec, ...]:
    import onnx_ir as ir
    import torch

    from fluxkiln.export.graph import check_template, finish_graph, set_static_shapes

    convolutional = inputs[0].name == "latents"
    dynamic = {name: {2: f"{name}_height", 3: f"{name}_width"} for name in ("latents", "image")}
    if convolutional:
        small = arguments[0][:, :, :TRACED_LATENT, :TRACED_LATENT]
        arguments = (small, *arguments[1:])
    torch.onnx.export(
        module,
        arguments,
        str(path),
        dynamo=False,
        opset_version=OPSETS["onnx17"],
        input_names=[spec.name for spec in (*inputs, *module.slots)],
        output_names=[spec.name for spec in outputs],
        dynamic_axes=dynamic if convolutional else None,
    )
    model = ir.load(path)
    if convolutional:
        set_static_shapes(model, inputs, outputs)
    slots = finish_graph(model, inputs, outputs)
    check_template(model, OPSETS["onnx17"], inputs, slots, outputs)
    ir.save(model, path)
    return slots


def _write_onnx23(
    module: Any,
    arguments: tuple[Tensor, ...],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    path: Path,
) -> None:
    import onnx_ir as ir
    import torch

    from fluxkiln.export.graph import check_template, fold_constants

    program = torch.onnx.export(
        module,
        arguments,
        dynamo=True,
        opset_version=OPSETS["onnx23"],
        optimize=False,
        input_names=[spec.name for spec in (*inputs, *module.slots)],
        output_names=[spec.name for spec in outputs],
        verbose=False,
    )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    model = program.model
    fold_constants(model)
    check_template(model, OPSETS["onnx23"], inputs, module.slots, outputs)
    ir.save(model, path)


def _write_pt2(module: Any, arguments: tuple[Tensor, ...], path: Path) -> None:
    import torch

    torch.export.save(torch.export.export(module, arguments, strict=False), path)


def _write_torchscript(module: Any, arguments: tuple[Tensor, ...], path: Path) -> None:
    import torch

    trace: Any = torch.jit.trace
    traced = trace(module, arguments, check_trace=False)
    if 'device("meta")' in traced.code:
        raise ExportError(
            "the traced graph creates tensors on the meta device, so TorchScript cannot hold it; use the pt2 format"
        )
    torch.jit.save(traced, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every Python branch on a static shape; the parity ladder is what judges the graph."""
    import logging

    import torch

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
