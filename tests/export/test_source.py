"""MODEL=: folders, presets and Hugging Face ids."""

from __future__ import annotations

import hashlib
import multiprocessing
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from fluxkiln.errors import CheckpointError, ResourceError, UsageError
from fluxkiln.export.checkpoint import open_checkpoint, read_tensor
from fluxkiln.export.source import find_stand_in, generator_digest, resolve_model
from fluxkiln.export.synth import synthesize
from fluxkiln.patches.flux1.presets import PRESETS


def test_a_folder_is_itself(tmp_path):
    assert resolve_model(str(tmp_path), tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


def test_a_preset_is_made_once(tmp_path, monkeypatch):
    folder = resolve_model("tiny-dev", tmp_path)
    assert folder.is_relative_to(tmp_path / "synth")
    assert open_checkpoint(folder).name == "tiny-dev"
    monkeypatch.setattr("fluxkiln.export.synth.synthesize", None)
    assert resolve_model("tiny-dev", tmp_path) == folder


def test_a_preset_is_made_again_when_its_data_change():
    preset = PRESETS["tiny-dev"]
    assert generator_digest(preset) != generator_digest(replace(preset, configs={**preset.configs, "vae": {}}))


def test_statistics_make_another_checkpoint_of_a_preset(tmp_path):
    plain = resolve_model("tiny-dev", tmp_path)
    drawn = resolve_model("tiny-dev", tmp_path, statistics="flux")
    assert (plain.name, drawn.name) == ("tiny-dev", "tiny-dev")
    assert resolve_model("tiny-dev", tmp_path, statistics="uniform") == plain
    assert resolve_model("tiny-dev", tmp_path, statistics="flux") == drawn
    first, second = (open_checkpoint(folder) for folder in (plain, drawn))
    assert first.configs == second.configs
    changed = {name for name in first.tensors if digest_of(first, name) != digest_of(second, name)}
    assert changed == {"transformer"}


def digest_of(checkpoint, component):
    return hashlib.sha256(
        b"".join(read_tensor(ref).tobytes() for ref in checkpoint.tensors[component].values())
    ).digest()


@pytest.mark.parametrize(
    ("spec", "statistics", "sentence"),
    [
        ("tiny-dev", "fluks", "no statistics are called 'fluks'; tiny-dev has uniform, flux"),
        (
            "scenes-dev",
            "flux",
            "--statistics flux: scenes-dev is trained and has its own weights; leave the option out",
        ),
        (".", "flux", "--statistics flux: . is no synthetic preset and has its own weights; leave the option out"),
        ("org/name", "flux", "--statistics flux: org/name is no synthetic preset and has its own weights"),
    ],
)
def test_statistics_that_cannot_be_had(tmp_path, spec, statistics, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        resolve_model(spec, tmp_path, statistics=statistics)
    assert list(tmp_path.iterdir()) == []


def test_a_preset_made_by_another_process_meanwhile(tmp_path, monkeypatch):
    def lose_the_race(name, destination, components=None, progress=None, statistics="uniform"):
        synthesize(name, destination)
        return synthesize(name, destination)

    monkeypatch.setattr("fluxkiln.export.synth.synthesize", lose_the_race)
    assert open_checkpoint(resolve_model("tiny-dev", tmp_path)).variant == "dev"


def test_two_processes_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.starmap(resolve_model, [("tiny-dev", tmp_path)] * 2)
    assert first == second
    assert [path.name for path in first.parent.iterdir()] == ["tiny-dev"]
    open_checkpoint(first)


@pytest.mark.parametrize("spec", ["tiny_dev", "./nowhere", "/nowhere", "a/b/c", "org/name@", "org /name"])
def test_neither_of_the_three(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"neither an existing folder.*tiny-dev, tiny-schnell, wide-dev, full-dev"):
        resolve_model(spec, tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with the index of a pipeline; what was asked of it."""
    asked: list[dict[str, object]] = []

    def serve(pipeline):
        (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')

        def fake(repository, revision, allow_patterns):
            asked.append({"repository": repository, "revision": revision, "patterns": allow_patterns})
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
        return asked

    return serve


def test_download_is_cut_to_the_diffusers_layout(tmp_path, hub):
    asked = hub("FluxPipeline")
    assert resolve_model("some-org/FLUX.1-x@refs/pr/7", tmp_path) == tmp_path
    assert {(one["repository"], one["revision"]) for one in asked} == {("some-org/FLUX.1-x", "refs/pr/7")}
    from huggingface_hub.utils import filter_repo_objects

    repository = synthesize("tiny-dev", tmp_path / "m")
    files = [str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()]
    kept = set(filter_repo_objects([*files, "flux1-dev.safetensors"], allow_patterns=asked[-1]["patterns"]))
    assert kept == set(files)


def test_what_is_not_compiled_is_known_before_its_weights_are_fetched(tmp_path, hub):
    asked = hub("FluxKontextPipeline")
    with pytest.raises(CheckpointError, match=r"'FluxKontextPipeline', FLUX\.1 Kontext, which takes a picture as well"):
        resolve_model("some-org/my-model", tmp_path)
    assert [one["patterns"] for one in asked] == [["model_index.json"]]


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("black-forest-labs/FLUX.1-Fill-dev", "FLUX.1 Fill, which takes a picture as well; text to image is all"),
        ("black-forest-labs/FLUX.1-Kontext-dev@main", "FLUX.1 Kontext, which"),
        ("black-forest-labs/FLUX.1-Depth-dev", "a FLUX.1 of structure"),
        ("black-forest-labs/FLUX.1-Redux-dev", "FLUX.1 Redux"),
        ("black-forest-labs/FLUX.2-klein-4B", "FLUX.2-klein, which is planned next"),
        ("black-forest-labs/FLUX.2-dev", "FLUX.2, another model; FLUX.2-klein is planned next"),
    ],
)
def test_what_is_known_by_its_name_is_refused_by_it(tmp_path, monkeypatch, hub, spec, what):
    """Gated repositories show their index to nobody who has not accepted their licence."""
    asked = hub("FluxPipeline")
    with pytest.raises(CheckpointError, match=re.escape(what)):
        resolve_model(spec, tmp_path)
    assert asked == []
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match=re.escape(what)):
        find_stand_in(spec)


class FakeResponse:
    """What huggingface_hub's errors ask of a response."""

    def __init__(self) -> None:
        self.headers = {"authorization": "Bearer hf_secret"}
        self.request = None
        self.status_code = 403


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("hf_secret", response=FakeResponse()), "is gated: accept its licence at https://"),
        (errors.RevisionNotFoundError("hf_secret", response=FakeResponse()), "has no such revision"),
        (errors.RepositoryNotFoundError("hf_secret", response=FakeResponse()), "does not exist or is private"),
        (errors.HfHubHTTPError("hf_secret", response=FakeResponse()), r"cannot be fetched \(HfHubHTTPError\)"),
        (errors.LocalEntryNotFoundError("hf_secret"), r"not in the local cache .*\(LocalEntryNotFoundError\)"),
        (errors.HFValidationError("hf_secret"), "is no valid Hugging Face id"),
        (TimeoutError("hf_secret"), r"cannot be fetched \(TimeoutError\); connect to the network"),
    ],
)
def test_download_errors_are_one_sentence_without_the_token(tmp_path, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model("org/name@rev", tmp_path)
    assert "hf_secret" not in str(caught.value)
    assert str(caught.value).startswith("org/name@rev ")
    assert "\n" not in str(caught.value)


def test_full_disk_while_fetching(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ResourceError, match="the disk is full while fetching org/name; free some space"):
        resolve_model("org/name", tmp_path)


def test_the_real_hub_library_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="some-org/some-model is not in the local cache"):
        resolve_model("some-org/some-model", tmp_path)


def test_a_preset_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny-dev").mkdir()
    assert resolve_model("tiny-dev", tmp_path / "cache") != Path("tiny-dev")
    assert resolve_model("./tiny-dev", tmp_path / "cache") == Path("tiny-dev")
    shutil.rmtree(tmp_path / "cache")


def test_models_of_the_hub_that_are_not_here_have_a_stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = []

    def fake(repository, revision, local_files_only):
        assert local_files_only, "a plan fetches nothing"
        if repository not in here:
            raise errors.LocalEntryNotFoundError("not here")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    found = {name: find_stand_in(f"black-forest-labs/FLUX.1-{name}") for name in ("dev", "schnell")}
    assert {name: preset.name for name, preset in found.items()} == {"dev": "full-dev", "schnell": "full-schnell"}
    with pytest.raises(UsageError, match=r"some-org/x is not on this machine, .*FLUX.1-dev \(as full-dev\)"):
        find_stand_in("some-org/x")
    here.append("some-org/x")
    assert find_stand_in("some-org/x") is None
    Path("a/folder").mkdir(parents=True)
    assert find_stand_in("a/folder") is find_stand_in("tiny-dev") is find_stand_in("no model") is None
