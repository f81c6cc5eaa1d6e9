"""diffusers' and transformers' own modules seen at work (checked with diffusers 0.42.1 and transformers 5.23.0).

Where each kind of part is seen in them and what they call its tensors; one recorded run seen as a run of any form:
inline, hoisted, or cut over ranks; and what their leaf modules make in the place of a part that is cut. Forward hooks
only: nothing upstream is replaced.
"""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.errors import PatchError, UsageError
from fluxkiln.files import write_durably
from fluxkiln.patches.flux1.kinds import NO_BLOCKS, list_parts, make_part, modulation_name
from fluxkiln.patches.model import Call, Put, Recorded
from fluxkiln.patches.parts import Leaf, watch_leaves
from fluxkiln.types import Configs, Part

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module


# upstream's forward by its own argument names, and what it returned -> the part's inputs and outputs
_Tell = Callable[[Mapping[str, Any], Any], tuple[dict[str, Any], dict[str, Any]]]
_PLAIN: Mapping[str, _Tell] = {
    "clip": lambda call, output: ({"input_ids": call["input_ids"]}, {"last_hidden_state": output.last_hidden_state}),
    "t5_embed": lambda call, output: ({"input_ids": call["input"]}, {"hidden_states_out": output}),
    # block 0 is given no bias, it computes and returns it; the others return the one they were given
    "t5_block": lambda call, output: (
        {"hidden_states": call["hidden_states"], "position_bias": output[1]},
        {"hidden_states_out": output[0]},
    ),
    "t5_final": lambda call, output: ({"hidden_states": call["hidden_states"]}, {"last_hidden_state": output}),
    "vae_decoder": lambda call, output: ({"latents": next(iter(call.values()))}, {"image": output}),
    "tiny_vae_decoder": lambda call, output: ({"latents": next(iter(call.values()))}, {"image": output}),
}
# the AdaLN norms of a block or of the model, in the order their rows are joined
_NORMS: Mapping[str, tuple[str, ...]] = {
    "double": ("norm1", "norm1_context"),
    "single": ("norm",),
    "tail": ("norm_out",),
}


def observe_part(pipe: Any, part: Part, put: Put) -> None:
    """Have `put` called each time `part` runs in `pipe`, a `diffusers.FluxPipeline`. Tensors are not to be kept.

    Raises, while `pipe` runs:
        PatchError: upstream gives its modules other arguments than this was written for.
    """
    match part.traits.family:
        case "head":
            _observe_embedders(pipe, part, put)
        case "modulation":
            _observe_modulation(pipe, part, put)
        case "double" | "single":
            _observe_block(pipe, part, put)
        case "tail":
            _observe_tail(pipe, part, put)
        case family:
            module, tell = _module_of(pipe, part), _PLAIN[family]
            module = module.encoder.embed_tokens if family == "t5_embed" else module
            _watch(module, lambda call, output: put(part, *tell(call, output)))


def _watch(module: Any, see: Callable[[Mapping[str, Any], Any], None]) -> None:
    """Have `see` called with the arguments of upstream's forward, by their names, and what it returned."""
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


def _observe_block(pipe: Any, part: Part, put: Put) -> None:
    import torch

    condition = _condition(pipe, part)

    def see(call: Mapping[str, Any], output: Any) -> None:
        cos, sin = call["image_rotary_emb"]
        given = {**condition(call), "rotary_cos": cos, "rotary_sin": sin}
        image, text = call["hidden_states"], call["encoder_hidden_states"]
        if part.traits.family == "double":
            inputs = {"hidden_states": image, "encoder_hidden_states": text, **given}
            put(part, inputs, {"hidden_states_out": output[1], "encoder_hidden_states_out": output[0]})
        else:
            inputs = {"hidden_states": torch.cat([text, image], dim=1), **given}
            put(part, inputs, {"hidden_states_out": torch.cat(output, dim=1)})

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


def recorded_calls(recorded: Recorded, part: Part) -> tuple[Call, ...]:
    """The calls of a part of any form, made of those that were recorded.

    Raises:
        UsageError: it was not recorded, or not in a form that it can be made of.
    """
    return _split_calls(recorded, part) if part.members else _whole_calls(recorded, part)


def _whole_calls(recorded: Recorded, part: Part) -> tuple[Call, ...]:
    found = recorded.kinds.get(part.name)
    if found == part.kind:
        return recorded.calls[part.name]
    source = modulation_name(part.name)
    if part.kind != f"{found}_modulated" or source not in recorded.calls:
        raise UsageError(
            f"part {part.name} of kind {part.kind} was not recorded (recorded as {found or 'nothing'}); record the "
            "reference again"
        )
    calls = []
    for call, modulation in zip(recorded.calls[part.name], recorded.calls[source], strict=True):
        known = {**call["inputs"], **modulation["outputs"]}
        calls.append({**call, "inputs": {name: known[name] for name in part.traits.inputs}})
    return tuple(calls)


def _split_calls(recorded: Recorded, part: Part) -> tuple[Call, ...]:
    kind, names, calls = part.traits, _inline_names(part), []
    for name in names:
        if name not in recorded.calls:
            raise UsageError(f"part {name} was not recorded; record the reference again")
    for step in range(len(recorded.calls[names[0]])):
        first, last = recorded.calls[names[0]][step], recorded.calls[names[-1]][step]
        known, made = dict(first["inputs"]), dict(last["outputs"])
        if kind.cut == "head":
            made["modulation"] = _stack(recorded, _modulated(recorded), step)
        elif kind.cut == "transformer":
            known = {**recorded.calls[names[1]][step]["inputs"], **known}
        elif "modulation" in kind.inputs:
            known["modulation"] = _stack(recorded, names, step)
        inputs = {name: known[name] for name in kind.inputs if name in known}
        calls.append({"inputs": inputs, "outputs": {name: made[name] for name in kind.outputs}})
    return tuple(calls)


def _inline_names(part: Part) -> tuple[str, ...]:
    """The names of the first, ..., last of the parts that a whole model has in the place of a split one."""
    if part.kind == "t5":
        return "t5_embed", "t5_final"
    return tuple(
        f"{kind}.{int(prefix.split('.')[1]):02d}" if kind in ("double", "single") else kind
        for kind, prefix in part.members
    )


def _modulated(recorded: Recorded) -> tuple[str, ...]:
    """Blocks and tail, in the order in which the head gives their rows."""
    groups = ("double", "single", "tail")
    return tuple(name for group in groups for name in sorted(recorded.calls) if name.partition(".")[0] == group)


def _stack(recorded: Recorded, names: Sequence[str], step: int) -> str:
    """A file with the modulation [1, rows, D] of several parts one after the other."""
    sources = [recorded.calls[modulation_name(name)][step]["outputs"]["modulation"] for name in names]
    if len(sources) == 1:
        return sources[0]
    file = f"tensors/stacked-{hashlib.sha256('/'.join(sources).encode()).hexdigest()}.npy"
    path = recorded.root / file
    if not path.is_file():
        data = io.BytesIO()
        np.save(data, np.concatenate([np.load(recorded.root / source) for source in sources], axis=1))
        write_durably(path, data.getvalue())
    return file


_Values = Mapping[str, "NDArray[Any]"]
# a part -> its wrapper module with the checkpoint's weights, float32
Load = Callable[[Part], "Module"]


def see_split_leaves(
    part: Part, configs: Configs, inputs: _Values, state: _Values, load: Load
) -> tuple[Leaf, ...] | None:
    """What diffusers' and transformers' own leaf modules make, in call order, float32; None for a part that is whole.

    Args:
        part: with one block at most. inputs: by the names of its kind, and the host's constants.
        state: its weights uncut, by slot.
    """
    if part.traits.cut == "t5":
        return _see_t5(configs, inputs, state)
    if part.traits.cut == "head":
        return _see_head(configs, inputs, load)
    return _see_block(part, inputs, load) if part.traits.cut in ("double", "single") else None


def _see_t5(configs: Configs, inputs: _Values, state: _Values) -> tuple[Leaf, ...]:
    import torch
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model: Any = T5EncoderModel(T5Config(**configs["text_encoder_2"]))
    weights = {name: torch.from_numpy(np.array(weight, np.float32)) for name, weight in state.items()}
    model.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]}, assign=True)
    seen = watch_leaves(model.eval())
    with torch.no_grad():
        model(torch.from_numpy(np.array(inputs["input_ids"], np.int64)))
    # the embedding is called by its place in the encoder, the checkpoint has it once
    return tuple(replace(leaf, name="shared" if leaf.name == "encoder.embed_tokens" else leaf.name) for leaf in seen)


def _see_head(configs: Configs, inputs: _Values, load: Load) -> tuple[Leaf, ...]:
    """The whole model's head, and the AdaLN linears of its blocks and of its tail."""
    import torch

    head = make_part("head", "head")
    module = load(head)
    seen = watch_leaves(module)
    given = [torch.from_numpy(np.array(inputs[name])) for name in head.traits.inputs if name in inputs]
    with torch.no_grad():
        *_, temb = module(*given)
    for part in list_parts({**NO_BLOCKS, **configs}, "kl", "hoisted"):
        if part.traits.family == "modulation":
            modulation = load(part)
            linears = watch_leaves(modulation)
            with torch.no_grad():
                modulation(temb)
            seen += [
                replace(leaf, name=f"{part.prefix}{leaf.name}") for leaf in linears if leaf.name.endswith("linear")
            ]
    return tuple(seen)


def _see_block(part: Part, inputs: _Values, load: Load) -> tuple[Leaf, ...]:
    """diffusers' own block, its AdaLN linears replaced by the rows that they would give."""
    import torch
    from torch import nn

    class GivenRows(nn.Module):
        """What an AdaLN norm returns: x normed and modulated, then the rows behind shift and scale."""

        def __init__(self, norm: Any, rows: Any) -> None:
            super().__init__()
            self.norm, self.rows = norm, rows

        def forward(self, x: Any, emb: Any) -> Any:
            shift, scale, *others = self.rows.unbind(1)
            return (self.norm(x) * (1 + scale[:, None]) + shift[:, None], *others)

    given = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in inputs.items()}
    module: Any = load(part)
    block, modulation, x = module.block, given["modulation"], given["hidden_states"]
    if part.kind == "double_modulated":
        block.norm1 = GivenRows(block.norm1, modulation[:, :6])
        block.norm1_context = GivenRows(block.norm1_context, modulation[:, 6:])
        streams = x, given["encoder_hidden_states"]
    else:
        block.norm = GivenRows(block.norm, modulation)
        # the block puts both together again; where they are parted is the same to it
        streams = x[:, 1:], x[:, :1]
    seen = watch_leaves(module)
    with torch.no_grad():
        block(*streams, temb=None, image_rotary_emb=(given["rotary_cos"], given["rotary_sin"]))
    return tuple(leaf for leaf in seen if leaf.type != "Dropout")
