"""What a build is made of: what its settings name, and what is fixed before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint, find_model
from fluxkiln.export.fingerprint import DigestMemo
from fluxkiln.export.source import resolve_model, synthetic_folder
from fluxkiln.patches.model import Model
from fluxkiln.patches.registry import all_presets, check_statistics, pick_components
from fluxkiln.progress import OnBytes
from fluxkiln.settings import Settings
from fluxkiln.types import Part

# of a model whose picture means nothing: two, so that a step follows another one
FEWEST_STEPS = 2


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that has been checked and may start. `name` is that of its folder.

    `changes`: part -> the length of what LoRAs add to it, as a share of the length of its changed tensors before.
    """

    settings: Settings
    checkpoint: Checkpoint
    plan: Plan
    cache: ActionCache
    name: str
    fingerprint: str
    changes: Mapping[str, float] = field(default_factory=dict)

    def lora_lines(self) -> dict[str, str]:
        """What LoRAs do, for people: of each file what matched and what did not, of each part how much it changes."""
        told = {}
        for one in self.checkpoint.loras:
            missing = one["missing"]
            more = f" and {len(missing) - 3} more" * (len(missing) > 3)
            gone = f"; {len(missing)} of its layers are not in what is built: {', '.join(missing[:3])}{more}"
            told[f"LoRA {one['file']} x {one['strength']:g}"] = (
                f"changes {one['tensors']} tensors{gone if missing else ', all of its layers were found'}"
            )
        return told | {f"{part} changes by": f"{100 * share:.3g} %" for part, share in self.changes.items()}

    @property
    def steps(self) -> int:
        """Denoising steps of the reference run."""
        return reference_steps(self.settings, self.checkpoint)


def reference_steps(settings: Settings, checkpoint: Checkpoint) -> int:
    """Denoising steps of the reference run: those asked for; else the preset's, as many as its picture needs."""
    preset = checkpoint.model.presets.get(checkpoint.name)
    return settings.steps or (preset.steps if preset else FEWEST_STEPS)


def model_of(settings: Settings) -> Model:
    """The model that the settings name, before anything of it is written; a Hugging Face id is fetched for it."""
    check_statistics(settings.model, settings.statistics)
    presets = all_presets()
    if settings.model in presets:
        return presets[settings.model][0]
    return find_model(find_root(settings, settings.components))


def models_folder(settings: Settings) -> Path:
    """Where synthetic checkpoints are kept that are written for builds."""
    return settings.build_dir / "models"


def find_root(settings: Settings, components: tuple[str, ...] | None, progress: OnBytes | None = None) -> Path:
    """The folder of the settings' checkpoint; as `resolve_model`."""
    return resolve_model(settings.model, models_folder(settings), progress, components, settings.statistics)


def open_memo(settings: Settings) -> DigestMemo:
    """What the store remembers of the digests of files."""
    return DigestMemo(settings.store_path.absolute() / "memo" / "tensors.json")


def choose_components(model: Model, settings: Settings) -> tuple[str, ...]:
    """The components to build, in the order of the pipeline; UsageError for one that there is not, or when what else
    is asked for needs those that are left out."""
    known = model.components
    chosen = pick_components(known, settings.components)
    if (settings.prompts or settings.seeds) and chosen != known:
        raise UsageError(
            f"prompts and seeds make whole images, and only {', '.join(chosen)} is built; leave --components out"
        )
    return chosen


def chosen_parts(settings: Settings, checkpoint: Checkpoint, split: bool = False) -> tuple[Part, ...]:
    """The parts of the components that the settings choose; configs of others need not be there."""
    model, configs = checkpoint.model, checkpoint.configs
    every = (
        model.list_split_parts(configs, settings.granularity, settings.vae)
        if split
        else model.list_parts(configs, settings.vae, settings.modulation)
    )
    chosen = choose_components(model, settings)
    return tuple(part for part in every if part.component in chosen)


def unwritten_bytes(settings: Settings) -> int:
    """Bytes of a synthetic checkpoint that a build has to write first; 0 if none."""
    from fluxkiln.export.synth import synthesized_bytes, with_sisters

    model = model_of(settings)
    preset = model.presets.get(settings.model)
    if not preset or preset.trained:
        return 0
    components = choose_components(model, settings)
    chosen = settings.components and components
    folder = synthetic_folder(preset, settings.statistics, models_folder(settings), chosen)
    if (folder / "model_index.json").is_file():
        return 0
    return synthesized_bytes(preset.name, with_sisters(model, components))
