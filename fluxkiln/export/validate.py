"""Does a checkpoint hold exactly the tensors that diffusers and transformers would load? Asked on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.model import Model

FLOAT_DTYPES = ("BF16", "F16", "F32")


def expected_tensors(model: Model, component: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the `state_dict()` that a component has with this config.

    Raises:
        CheckpointError: the class does not accept the config.
    """
    import torch

    class_name, cls = model.classes[component], model.load_class(component)
    try:
        with torch.device("meta"):
            if component in model.tokenizers:
                module = cls(cls.config_class.from_dict(dict(config)))
            else:
                module = cls.from_config(dict(config))
    except Exception as error:  # whatever a constructor raises about values it does not like
        raise CheckpointError(
            f"{component}/config.json does not describe a {class_name} ({type(error).__name__}: {error}); "
            f"copy or fetch it again"
        ) from error
    # a tied tensor has two names there; a checkpoint is opened with the first only
    tied = model.tied.get(component, ())
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if name not in tied}


def validate_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every opened component with its class: names, shapes, dtypes.

    Raises:
        CheckpointError: the first tensor that is missing, unexpected, of another shape or no float, and how many more.
    """
    for component, refs in checkpoint.tensors.items():
        expected = expected_tensors(checkpoint.model, component, checkpoint.configs[component])
        class_name = checkpoint.model.classes[component]
        where = f"{component} of {checkpoint.name}"
        if missing := [name for name in expected if name not in refs]:
            raise CheckpointError(
                f"{where} lacks {missing[0]}{_and_more(missing)}: its config.json describes a {class_name} with it; "
                f"config and weights are of different models: fetch both again"
            )
        if unexpected := [name for name in refs if name not in expected]:
            raise CheckpointError(
                f"{where} has {unexpected[0]}{_and_more(unexpected)}, which {class_name} with its config.json does not "
                f"know; merge adapters before compiling, or fetch config and weights again"
            )
        for name, shape in expected.items():
            if refs[name].shape != shape:
                raise CheckpointError(
                    f"{name} in {where} has the shape {list(refs[name].shape)}, {class_name} by its config.json has "
                    f"{list(shape)}; config and weights are of different models: fetch both again"
                )
            if refs[name].dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{name} in {where} is {refs[name].dtype}, weights must be {', '.join(FLOAT_DTYPES)}; fluxkiln "
                    f"quantizes by itself: give the unquantized checkpoint"
                )


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
