"""Several sizes of a model that is cut: modules of each, the shards of one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.build.make import build
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.toolchain import open_executor
from fluxkiln.errors import ToolchainError
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes

pytestmark = pytest.mark.thorough
OTHER = Shapes(height=32, width=48, tokens=16)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tiny_checkpoint):
    """Of both sizes, and of the other alone."""
    both = Settings(
        "trn1", str(tiny_checkpoint().root), components=("transformer",), size=((32, 32), (48, 32)), verify=False,
        build_dir=tmp_path_factory.mktemp("sizes"),
    )  # fmt: skip
    made = []
    for settings in (both, replace(both, size=((48, 32),))):
        with pytest.raises(ToolchainError) as caught:  # there is no neuronx-cc
            build(settings)
        made.append(open_bundle(caught.value.result.bundle))
    return made


def shards(bundle):
    return {file.path: file.sha256 for file in bundle.manifest.files if file.path.startswith("weights/")}


def test_one_set_of_shards(bundles):
    both, alone = bundles
    assert shards(both) == shards(alone) != {}
    modules = [{file.path for file in one.manifest.files if file.path.startswith("hlo/")} for one in bundles]
    assert len(modules[0]) == 2 * len(modules[1])
    assert "hlo/double.48x32-16.hlo_module.pb" in modules[0]


def test_the_further_size_computes_what_a_bundle_of_it_alone_does(bundles):
    both, alone = bundles
    made = []
    for bundle in (both.at(OTHER), alone):
        random, executor = np.random.default_rng(0), open_executor(bundle, "replicas")
        specs = bundle.nets["double.01"].inputs
        inputs = {spec.name: random.standard_normal(spec.shape).astype(np.float32) for spec in specs}
        made.append(executor("double.01", inputs))
        executor.close()
    for name, array in made[1].items():
        np.testing.assert_array_equal(made[0][name], array)
