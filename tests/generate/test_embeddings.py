"""Prompts that are encoded elsewhere: the same picture, and what other encoders made is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxkiln.build.make import build
from fluxkiln.cli.main import main
from fluxkiln.compile.opener import open_bundle
from fluxkiln.errors import UsageError
from fluxkiln.generate.embeddings import read_embeddings, save_embeddings
from fluxkiln.generate.painter import Encoded
from fluxkiln.settings import Settings

PROMPT = "a kiln by a river"


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint, tmp_path_factory):
    """The whole of a model, its text encoders, and the rest."""
    folder = tmp_path_factory.mktemp("built")
    encoders = ("text_encoder", "text_encoder_2")
    return [
        build(
            Settings(
                "cpu", str(tiny_checkpoint().root), verify=False, components=components, build_dir=folder / "build"
            )
        ).bundle
        for components in (None, encoders, ("transformer", "vae"))
    ]


def generate(bundle, folder, *options):
    fixed = ["--steps", "2", "--out", str(folder / "one.png"), "--save-latents"]
    assert main(["generate", "--bundle", str(bundle), *fixed, *map(str, options)]) == 0
    return np.load(folder / "one.npy")


def test_a_bundle_without_encoders_paints_what_the_whole_one_does(bundles, tmp_path, capsys):
    whole, encoders, rest = bundles
    file = tmp_path / "prompts.safetensors"
    wanted = generate(whole, tmp_path, PROMPT, "--save-embeddings", file)
    np.testing.assert_array_equal(generate(rest, tmp_path, "--embeddings", file), wanted)
    np.testing.assert_array_equal(generate(rest, tmp_path, PROMPT, "--embeddings", file), wanted)
    np.testing.assert_array_equal(generate(rest, tmp_path, PROMPT, "--encoders", encoders), wanted)
    assert not np.array_equal(generate(whole, tmp_path, "another"), wanted)
    for options, words in (
        ((PROMPT,), "has no text_encoder, text_encoder_2"),
        (("another", "--embeddings", file), "there are no text encoders here"),
    ):
        assert main(["generate", "--bundle", str(rest), *map(str, options), "--out", str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists() or not list((tmp_path / "no").iterdir())


def test_embeddings_of_another_encoder_are_refused(bundles, tmp_path):
    whole = open_bundle(bundles[0])
    assert whole.encoders == open_bundle(bundles[1]).encoders != ""
    file = tmp_path / "other.safetensors"
    embeds = {"prompt_embeds": np.zeros((1, 2, 3), np.float32)}
    save_embeddings(file, "sha256:" + "0" * 64, {(PROMPT, None, True): Encoded(embeds)})
    read_embeddings(file).check(open_bundle(bundles[2]))  # nothing says which encoders it was made for
    with pytest.raises(UsageError, match="its text encoders are sha256:000000000000, those of"):
        read_embeddings(file).check(whole)


def spoil(file, change):
    tensors = load_file(file)
    told = {"format": "fluxkiln.embeddings/1", "encoders": "x", "prompts": [[PROMPT, None, True]]}
    change(tensors, told)
    save_file(tensors, file, {"embeddings": json.dumps(told)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, told: told.update(format="other"), "has no embeddings of prompts"),
        (lambda tensors, told: told.pop("prompts"), "prompts"),
        (lambda tensors, told: told.update(prompts=[["one"]]), "not enough values"),
        (lambda tensors, told: told["prompts"].append(["two", None, True]), "prompt 1 has no numbers"),
        (lambda tensors, told: tensors["0.prompt_embeds"].fill(np.nan), "prompt 0 has no numbers"),
    ],
)
def test_a_file_that_is_none(tmp_path, change, words):
    file = tmp_path / "made.safetensors"
    save_embeddings(file, "x", {(PROMPT, None, True): Encoded({"prompt_embeds": np.ones((1, 2, 3), np.float32)})})
    assert list(read_embeddings(file).prompts) == [(PROMPT, None, True)]
    spoil(file, change)
    with pytest.raises(UsageError, match=words):
        read_embeddings(file)
    with pytest.raises(UsageError, match="--embeddings"):
        read_embeddings(tmp_path / "none")
