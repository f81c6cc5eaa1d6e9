"""Where each kind of part is seen in diffusers' and transformers' own modules, and what upstream calls its tensors.

Forward hooks only (checked with diffusers 0.42.1 and transformers 5.23.0): nothing upstream is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fluxkiln.errors import PatchError
from fluxkiln.patches.model import Put
from fluxkiln.types import Part

# what upstream's forward was given, by its own argument names, and what it returned
See = Callable[[Mapping[str, Any], Any], None]


def observe_part(pipe: Any, part: Part, put: Put) -> None:
    """Have `put` called each time `part` runs in `pipe`, a `diffusers.FluxPipeline`. Tensors are not to be kept.

    Raises, while `pipe` runs:
        PatchError: upstream gives its modules other arguments than this was written for.
    """
    _OBSERVERS[part.traits.family](pipe, part, put)


def _watch(module: Any, see: See) -> None:
    signature = inspect.signature(module.forward)

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        try:
            see(signature.bind(*args, **kwargs).arguments, output)
        except KeyError as error:
            raise PatchError(
                f"{type(module).__name__}.forward was called without {error}; install the versions pinned in "
                "constraints.txt"
            ) from error

    module.register_forward_hook(hook, with_kwargs=True)


def _module_of(pipe: Any, part: Part) -> Any:
    return getattr(pipe, part.component).get_submodule(part.prefix.rstrip("."))


def _observe_clip(pipe: Any, part: Part, put: Put) -> None:
    def see(call: Mapping[str, Any], output: Any) -> None:
        put(part, {"input_ids": call["input_ids"]}, {"last_hidden_state": output.last_hidden_state})

    _watch(pipe.text_encoder, see)


def _observe_t5_embed(pipe: Any, part: Part, put: Put) -> None:
    def see(call: Mapping[str, Any], output: Any) -> None:
        put(part, {"input_ids": call["input"]}, {"hidden_states_out": output})

    _watch(pipe.text_encoder_2.encoder.embed_tokens, see)


def _observe_t5_block(pipe: Any, part: Part, put: Put) -> None:
    def see(call: Mapping[str, Any], output: Any) -> None:
        # block 0 is given no bias, it computes and returns it; the others return the one they were given
        inputs = {"hidden_states": call["hidden_states"], "position_bias": output[1]}
        put(part, inputs, {"hidden_states_out": output[0]})

    _watch(_module_of(pipe, part), see)


def _observe_t5_final(pipe: Any, part: Part, put: Put) -> None:
    def see(call: Mapping[str, Any], output: Any) -> None:
        put(part, {"hidden_states": call["hidden_states"]}, {"last_hidden_state": output})

    _watch(_module_of(pipe, part), see)


def _keep(kept: dict[str, Any], name: str, module: Any, args: Any, output: Any) -> None:
    kept[name] = output


def _observe_embedders(pipe: Any, part: Part, put: Put) -> None:
    """Parts that are given what the model is given, and make what its embedders make."""
    model, kind = pipe.transformer, part.traits
    outputs: dict[str, Any] = {}
    embedders = {
        "hidden_states_out": model.x_embedder,
        "encoder_hidden_states_out": model.context_embedder,
        "temb": model.time_text_embed,
    }
    for name in kind.outputs:
        embedders[name].register_forward_hook(partial(_keep, outputs, name))

    def see(call: Mapping[str, Any], _: Any) -> None:
        put(part, {name: call[name] for name in kind.inputs if call.get(name) is not None}, outputs)
        outputs.clear()

    _watch(model, see)


# the AdaLN norms of a block or of the model, in the order their rows are joined
_NORMS: Mapping[str, tuple[str, ...]] = {
    "double": ("norm1", "norm1_context"),
    "single": ("norm",),
    "tail": ("norm_out",),
}


def _keep_modulation(pipe: Any, part: Part) -> Callable[[], Any]:
    """Keeps what the AdaLN linears of a block or of the tail make; returns what joins and forgets it."""
    import torch

    names, owner = _NORMS[part.traits.block], _module_of(pipe, part)
    rows: dict[str, Any] = {}
    for name in names:
        owner.get_submodule(f"{name}.linear").register_forward_hook(partial(_keep, rows, name))
    width = owner.get_submodule(names[0]).linear.in_features
    return lambda: torch.cat([rows.pop(name) for name in names], dim=1).reshape(1, -1, width)


def _observe_modulation(pipe: Any, part: Part, put: Put) -> None:
    modulation, owner = _keep_modulation(pipe, part), _module_of(pipe, part)
    last = _NORMS[part.traits.block][-1]
    temb = "conditioning_embedding" if last == "norm_out" else "emb"
    _watch(owner.get_submodule(last), lambda call, _: put(part, {"temb": call[temb]}, {"modulation": modulation()}))


def _condition(pipe: Any, part: Part) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What a block or the tail is told about the step: temb, or in the hoisted form the modulation made of it."""
    if "modulation" in part.traits.inputs:
        modulation = _keep_modulation(pipe, part)
        return lambda call: {"modulation": modulation()}
    return lambda call: {"temb": call["conditioning_embedding" if part.kind == "tail" else "temb"]}


def _rotary(call: Mapping[str, Any]) -> dict[str, Any]:
    cos, sin = call["image_rotary_emb"]
    return {"rotary_cos": cos, "rotary_sin": sin}


def _observe_double(pipe: Any, part: Part, put: Put) -> None:
    condition = _condition(pipe, part)

    def see(call: Mapping[str, Any], output: Any) -> None:
        streams = {name: call[name] for name in ("hidden_states", "encoder_hidden_states")}
        outputs = {"hidden_states_out": output[1], "encoder_hidden_states_out": output[0]}
        put(part, {**streams, **condition(call), **_rotary(call)}, outputs)

    _watch(_module_of(pipe, part), see)


def _observe_single(pipe: Any, part: Part, put: Put) -> None:
    import torch

    condition = _condition(pipe, part)

    def see(call: Mapping[str, Any], output: Any) -> None:
        joint = torch.cat([call["encoder_hidden_states"], call["hidden_states"]], dim=1)
        outputs = {"hidden_states_out": torch.cat(output, dim=1)}
        put(part, {"hidden_states": joint, **condition(call), **_rotary(call)}, outputs)

    _watch(_module_of(pipe, part), see)


def _observe_tail(pipe: Any, part: Part, put: Put) -> None:
    inputs: dict[str, Any] = {}
    condition = _condition(pipe, part)

    def see_norm(call: Mapping[str, Any], _: Any) -> None:
        inputs.update(hidden_states=call["x"], **condition(call))

    def see_projection(_: Mapping[str, Any], output: Any) -> None:
        put(part, inputs, {"sample": output})
        inputs.clear()

    _watch(pipe.transformer.norm_out, see_norm)
    _watch(pipe.transformer.proj_out, see_projection)


def _observe_vae(pipe: Any, part: Part, put: Put) -> None:
    decoder = _module_of(pipe, part)
    first = next(iter(inspect.signature(decoder.forward).parameters))
    _watch(decoder, lambda call, output: put(part, {"latents": call[first]}, {"image": output}))


# by the family of the kind
_OBSERVERS: Mapping[str, Callable[[Any, Part, Put], None]] = {
    "clip": _observe_clip,
    "t5_embed": _observe_t5_embed,
    "t5_block": _observe_t5_block,
    "t5_final": _observe_t5_final,
    "head": _observe_embedders,
    "modulation": _observe_modulation,
    "double": _observe_double,
    "single": _observe_single,
    "tail": _observe_tail,
    "vae_decoder": _observe_vae,
    "tiny_vae_decoder": _observe_vae,
}
