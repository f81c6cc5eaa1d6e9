"""The models there are: a folder of this package each, and those that other distributions register.

Such a distribution has an entry point in the group `fluxkiln.models`, whose value is an object as
`fluxkiln.patches.model.Model` describes it. One that cannot be used is left out with a sentence that says why.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Sequence
from functools import cache

import fluxkiln.patches
from fluxkiln.errors import CheckpointError, IntegrityError, UsageError
from fluxkiln.patches.model import API, Model, Preset
from fluxkiln.plugins import find_plugins
from fluxkiln.settings import DEFAULT_STATISTICS
from fluxkiln.types import BindingLicence, Configs

GROUP = "fluxkiln.models"


@cache
def all_models() -> tuple[Model, ...]:
    """Those of this package first."""
    own = tuple(
        importlib.import_module(f"fluxkiln.patches.{module.name}.model").MODEL
        for module in pkgutil.iter_modules(fluxkiln.patches.__path__)
        if module.ispkg
    )
    return (*own, *find_plugins(GROUP, Model, API, {model.name for model in own}))


def model_for(pipeline_class: object, where: str) -> Model:
    """The model whose checkpoints have this class in `model_index.json`; CheckpointError with those that there are."""
    for model in all_models():
        if model.pipeline_class == pipeline_class:
            return model
    if near := find_relative(str(pipeline_class)):
        raise CheckpointError(f"{where} is for {pipeline_class!r}, {near}")
    known = ", ".join(f"{model.pipeline_class} ({model.title})" for model in all_models())
    raise CheckpointError(
        f"{where} is for {pipeline_class!r}, fluxkiln compiles {known}; give a folder that one of these wrote with "
        "save_pretrained, a Hugging Face id, or a synthetic preset"
    )


def find_relative(name: str) -> str:
    """What a model near one there is is, by its pipeline's class or its repository's name, and what is planned of it;
    empty where it is none."""
    every = (one for model in all_models() for one in getattr(model, "relatives", {}).items())
    return next((what for begins, what in every if name.lower().startswith(begins.lower())), "")


def model_named(name: str, configs: Configs) -> Model:
    """The model of a bundle; UsageError where there is none of that name, IntegrityError where the configs' transformer
    is another model's."""
    for model in all_models():
        if model.name == name:
            break
    else:
        known = ", ".join(model.name for model in all_models())
        raise UsageError(f"the bundle's model is {name!r}; this fluxkiln knows {known}: install what made it")
    found = configs.get("transformer", {}).get("_class_name")
    if "transformer" in configs and found != model.classes["transformer"]:
        raise IntegrityError(
            f"the bundle's transformer is a {found!r}, {model.title} has {model.classes['transformer']}; build or "
            "fetch the bundle again"
        )
    return model


def all_presets() -> dict[str, tuple[Model, Preset]]:
    """Synthetic presets of all models by name."""
    return {name: (model, preset) for model in reversed(all_models()) for name, preset in model.presets.items()}


def check_statistics(spec: str, statistics: str) -> None:
    """Raise UsageError unless `spec`, as `MODEL=` has it, is a model whose weights can be drawn with these."""
    if statistics == DEFAULT_STATISTICS:
        return
    model, preset = all_presets().get(spec, (None, None))
    if model is None or preset is None or preset.trained:
        what = "is trained and" if preset else "is no synthetic preset and"
        raise UsageError(f"--statistics {statistics}: {spec} {what} has its own weights; leave the option out")
    if statistics not in model.statistics:
        raise UsageError(
            f"no statistics are called {statistics!r}; {spec} has {', '.join((DEFAULT_STATISTICS, *model.statistics))}"
        )


def title_of(variant: str) -> str:
    """What people call the model whose variant a bundle is of: `FLUX.1-dev`; the variant where nobody knows it."""
    return next((f"{model.title}-{variant}" for model in all_models() if variant in model.steps), variant)


def hub_id_of(variant: str) -> str:
    """Where a variant of a model is published; empty where nobody knows."""
    return next((model.hub_ids[variant] for model in all_models() if variant in model.hub_ids), "")


def binding_licences() -> tuple[BindingLicence, ...]:
    """Those of all models."""
    return tuple(dict.fromkeys(one for model in all_models() for one in model.binding_licences))


def pick_components(known: Sequence[str], names: Collection[str] | None) -> tuple[str, ...]:
    """Those of `known` that are asked for, in its order, all of them for None; UsageError names an unknown one."""
    if names is None:
        return tuple(known)
    for name in names:
        if name not in known:
            raise UsageError(f"no component is called {name!r}; there are {', '.join(known)}")
    if not names:
        raise UsageError(f"no component was asked for; there are {', '.join(known)}")
    return tuple(name for name in known if name in names)


def component_of(kind: str) -> str:
    """The component of a kind of any model, by its name or that of its cut; empty for one that nobody knows."""
    every = (one for model in all_models() for one in model.kinds.values())
    return next((one.component for one in every if kind in (one.name, one.cut)), "")
