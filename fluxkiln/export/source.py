"""What `MODEL=` may be: a folder, a synthetic preset, or a Hugging Face id; each ends as a folder on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from fluxkiln.errors import CheckpointError, ResourceError, UsageError
from fluxkiln.export.folders import trained_folder
from fluxkiln.patches.model import Preset
from fluxkiln.patches.registry import all_models, all_presets, check_statistics, find_relative
from fluxkiln.progress import OnBytes
from fluxkiln.settings import DEFAULT_STATISTICS

_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve_model(
    spec: str,
    cache_dir: Path,
    progress: OnBytes | None = None,
    components: Collection[str] | None = None,
    statistics: str = DEFAULT_STATISTICS,
) -> Path:
    """The folder of the checkpoint that `spec` names; made or fetched first where it is not there yet.

    Args:
        spec: a preset, the path of a folder, or `org/name` with an optional `@revision`. A folder of that name wins
            over a Hugging Face id, a preset over a folder (write `./tiny-dev` for the folder).
        cache_dir: where synthetic checkpoints are kept. Downloads go to the Hugging Face cache.
        progress: called with bytes of a synthetic checkpoint written and to be written.
        components: which of them a synthetic checkpoint must have; None for all.
        statistics: how its weights are drawn.

    Raises:
        UsageError: none of the three, or statistics of a model that is not synthetic.
        CheckpointError: a model near one there is; the download failed: one sentence says why, and never shows a token.
        ResourceError: the disk is full.
    """
    check_statistics(spec, statistics)
    presets = all_presets()
    if spec in presets and presets[spec][1].trained:
        return trained_folder(presets[spec][1])
    if spec in presets:
        return _synthesize_once(presets[spec][1], statistics, cache_dir, progress, components)
    path = Path(spec).expanduser()
    if path.exists():
        return path
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise UsageError(
            f"{spec!r} is no model: neither an existing folder, nor a Hugging Face id (org/name), nor a synthetic "
            f"preset ({', '.join(presets)})"
        )
    _refuse_relative(match["repository"])
    return _download(match["repository"], match["revision"])


def find_stand_in(spec: str) -> Preset | None:
    """The preset with the shapes of a Hugging Face model that is not on this machine; None for all other models.

    Raises:
        UsageError: a model of Hugging Face that is not here, and no preset has its shapes.
    """
    presets, match = all_presets(), _HUB_ID.fullmatch(spec)
    if match is None or spec in presets or Path(spec).expanduser().exists():
        return None
    from huggingface_hub import errors, snapshot_download

    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        snapshot_download(match["repository"], revision=match["revision"], local_files_only=True)
        return None
    found = next((one for _, one in presets.values() if one.hub and one.hub == match["repository"]), None)
    if found is None:
        _refuse_relative(match["repository"])
        known = ", ".join(f"{one.hub} (as {name})" for name, (_, one) in presets.items() if one.hub)
        raise UsageError(
            f"{spec} is not on this machine, and a plan fetches nothing; give a folder, or a model of the same shapes: "
            f"{known}"
        )
    return found


def _refuse_relative(repository: str) -> None:
    if near := find_relative(repository.partition("/")[2]):
        raise CheckpointError(f"{repository} is {near}; nothing was fetched")


def hub_patterns() -> list[str]:
    """The diffusers layout without the single-file copies of the same weights that repositories also hold."""
    weights = ("config.json", "*.safetensors", "*.safetensors.index.json")
    found = {f"{folder}/{pattern}": None for model in all_models() for folder in model.classes for pattern in weights}
    found |= {f"{folder}/*": None for model in all_models() for folder in ("scheduler", *model.tokenizers.values())}
    return ["model_index.json", "LICENSE*", *found]


def generator_digest(preset: Preset, statistics: str = DEFAULT_STATISTICS) -> str:
    """Short key of what `synthesize` writes for `preset` with its default seed."""
    left_out = ("trained", "steps", "hub")
    fields = {name: value for name, value in asdict(replace(preset, trained=None)).items() if name not in left_out}
    model, _ = all_presets()[preset.name]
    made_from = [model.generator, fields]
    if rules := model.statistics.get(statistics):
        made_from.append({name: [asdict(rule) for rule in some] for name, some in rules.items()})
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def synthetic_folder(
    preset: Preset, statistics: str, cache_dir: Path, components: Collection[str] | None = None
) -> Path:
    """Where a synthetic checkpoint with these components is kept: a whole one where there is one."""
    folder = cache_dir / "synth" / generator_digest(preset, statistics) / preset.name
    if components is None or (folder / "model_index.json").is_file():
        return folder
    return folder.parent / "+".join(sorted(components)) / preset.name


def _synthesize_once(
    preset: Preset, statistics: str, cache_dir: Path, progress: OnBytes | None, components: Collection[str] | None
) -> Path:
    from fluxkiln.export.synth import synthesize, with_sisters

    # The folder's own name is the model's name.
    folder = synthetic_folder(preset, statistics, cache_dir, components)
    if (folder / "model_index.json").is_file():
        return folder
    chosen = None if components is None else with_sisters(all_presets()[preset.name][0], components)
    try:
        return synthesize(preset.name, folder, chosen, progress=progress, statistics=statistics)
    except UsageError:
        # Another process may have finished the same folder meanwhile.
        if (folder / "model_index.json").is_file():
            return folder
        raise


def _download(repository: str, revision: str | None) -> Path:
    """The repository's folder in the cache; what is no model there is, is known by its index before weights come."""
    from fluxkiln.export.checkpoint import find_model

    find_model(_fetch(repository, revision, ["model_index.json"]))
    return _fetch(repository, revision, hub_patterns())


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = f"{repository}@{revision}" if revision else repository
    page = f"https://huggingface.co/{repository}"
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except errors.GatedRepoError:
        reason = f"is gated: accept its licence at {page}, then log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"has no such revision; branches and tags are listed at {page}/tree/main"
    except errors.RepositoryNotFoundError:
        reason = f"does not exist or is private; check the name at {page}, and `hf auth whoami`"
    except errors.HFValidationError:
        reason = "is no valid Hugging Face id; write org/name, with @revision if needed"
    except Exception as error:  # whatever the hub's HTTP library raises
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk is full while fetching {name}; free some space, or set HF_HOME") from None
        # Its text may hold request headers or signed addresses: name the kind only.
        reason = (
            f"is not in the local cache and cannot be fetched ({type(error).__name__}); connect to the network, "
            f"or give a folder or a synthetic preset"
        )
    else:
        return Path(folder)
    raise CheckpointError(f"{name} {reason}")
