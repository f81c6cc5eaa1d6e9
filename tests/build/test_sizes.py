"""A bundle of several sizes: each paints what a bundle of that size alone does, and what is not its own is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxkiln.build.make import build, outline
from fluxkiln.compile.bundle import FURTHER_SIZES, HOST_CONSTANTS
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.toolchain import open_executor
from fluxkiln.errors import IntegrityError, ShapeError, UsageError
from fluxkiln.files import digest_file
from fluxkiln.generate.painter import Painter, Request, choose_size, paint
from fluxkiln.settings import Settings, parse_sizes, parse_tokens
from fluxkiln.types import Shapes
from tests.hostile.forged import forge

WIDE, HIGH = Shapes(height=32, width=48, tokens=16), Shapes(height=48, width=32, tokens=16)
ASKED = ((32, 32), (48, 32), (32, 48))


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sizes")
    return Settings(
        "cpu", str(tiny_checkpoint().root), size=ASKED, scheme="W4BF16", verify=False, build_dir=folder / "build"
    )


@pytest.fixture(scope="module")
def several(settings):
    return build(settings)


@pytest.fixture
def copied(several, tmp_path):
    shutil.copytree(several.bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def painted(bundle):
    with Painter(bundle, open_executor(bundle)) as painter:
        (picture,) = paint(painter, [Request("a kiln", steps=2)])
    return picture.image


def test_every_size_paints_as_a_bundle_of_its_own(several, settings):
    bundle = open_bundle(several.bundle, whole=True)
    assert bundle.sizes[1:] == (WIDE, HIGH)
    alone = open_bundle(build(replace(settings, size=((32, 48),))).bundle)
    assert alone.shapes == HIGH
    image = painted(bundle.at(HIGH))
    assert image.shape == (48, 32, 3)
    np.testing.assert_array_equal(image, painted(alone))
    assert painted(bundle.at(WIDE)).shape == (32, 48, 3)
    assert painted(bundle).shape == (32, 32, 3), "the first size, where none is named"


def test_weights_are_there_once(several, settings):
    alone = build(replace(settings, size=ASKED[:1]))
    weights = [
        {file.path: file.sha256 for file in open_bundle(one.bundle).manifest.files if file.role == "weights"}
        for one in (several, alone)
    ]
    assert weights[0] == weights[1]


def swap_tables(constants: Path) -> None:
    arrays = load_file(constants)
    for name in ("rotary_cos", "rotary_sin"):
        one, other = (f"{name}@{shapes.label}" for shapes in (WIDE, HIGH))
        assert arrays[one].shape == arrays[other].shape
        arrays[one], arrays[other] = arrays[other], arrays[one]
    constants.unlink()
    save_file(arrays, constants)


def test_exchanged_position_tables_are_refused(copied):
    constants = copied / HOST_CONSTANTS
    swap_tables(constants)
    digest, size = digest_file(constants)

    def change(document):
        entry = next(file for file in document["files"] if file["path"] == HOST_CONSTANTS)
        entry.update(sha256=digest.removeprefix("sha256:"), size=size)

    bundle = open_bundle(forge(copied, change))
    painted(bundle)
    for shapes in (WIDE, HIGH):
        with pytest.raises(ShapeError, match=f"not have the positions of {shapes.width}x{shapes.height}"):
            painted(bundle.at(shapes))


def graph_of_first(document):
    first = next(part for part in document["parts"] if part["name"] == "double.00")
    other = next(part for part in document["parts"] if part["name"].startswith("double.00@"))
    other.update({name: first[name] for name in ("digest", "size", "file")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["settings"][FURTHER_SIZES].append(d["settings"][FURTHER_SIZES][0]), "twice"),
        (lambda d: d["settings"][FURTHER_SIZES].append(d["shapes"]), "twice"),
        (lambda d: d["settings"][FURTHER_SIZES][0].update(width=48.0), "not whole"),
        (lambda d: d["settings"][FURTHER_SIZES][0].update(width=50), "multiple of 16"),
        (lambda d: d["settings"].update({FURTHER_SIZES: 3}), "no sizes"),
        (lambda d: d["settings"][FURTHER_SIZES].pop(), "has nothing there"),
        (lambda d: d["settings"].pop(FURTHER_SIZES), "has nothing there"),
        (graph_of_first, "part double.00@48x32-16 is said to be the graph"),
    ],
)
def test_sizes_that_are_not_its_own(copied, change, words):
    with pytest.raises(IntegrityError, match=words):
        open_bundle(forge(copied, change))


def test_a_size_that_is_not_there_is_refused_with_the_nearest(several):
    bundle = open_bundle(several.bundle)
    assert choose_size(bundle, (48, 32)) == WIDE
    assert choose_size(bundle, None, 16) == bundle.shapes
    with pytest.raises(ShapeError, match=r"size 32x64: .* for 32x48 with 16 .*, 32x32 with .*--size 32x64"):
        choose_size(bundle, (32, 64))
    with pytest.raises(ShapeError, match=r"size 48x32 with 24 text tokens: .*for 48x32 with 16 text tokens"):
        choose_size(bundle, (48, 32), 24)
    with pytest.raises(ShapeError, match="multiple of 16"):
        choose_size(bundle, (40, 32))


def test_texts_of_several_sizes():
    assert parse_sizes("64x32, 32") == ((64, 32), (32, 32))
    assert parse_tokens("512,256") == (512, 256)
    for text in ("64x32,64x32", "64,64x64", ",".join(str(16 * n) for n in range(1, 18))):
        with pytest.raises(UsageError, match="give each once, and at most 16"):
            parse_sizes(text)
    for text in ("512,512", "5.5", "512,", "x"):
        with pytest.raises(UsageError, match="--tokens"):
            parse_tokens(text)
    with pytest.raises(ShapeError, match="multiple of 16"):
        parse_sizes("64x64,50x64")


def test_a_target_of_one_size_refuses_several(tmp_path):
    with pytest.raises(UsageError, match=r"2 sizes: a bundle for gguf is of one; give one --size"):
        outline(Settings("gguf", "tiny-dev", size=((32, 32), (48, 32)), build_dir=tmp_path))


def test_folders_of_several_sizes(tmp_path):
    few = outline(Settings("cpu", "tiny-dev", size=ASKED[:2], tokens=(16, 24), build_dir=tmp_path))
    assert few.name == "tiny-dev-bf16-32x32-16_48x32-16_32x32-24_48x32-24"
    assert [shapes.tokens for shapes in few.plan.sizes] == [16, 16, 24, 24]
    many = outline(Settings("cpu", "tiny-dev", size=tuple((32, 16 * n) for n in range(2, 18)), build_dir=tmp_path))
    assert many.name.startswith("tiny-dev-bf16-16-sizes-")
