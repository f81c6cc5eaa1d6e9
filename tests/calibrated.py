"""A calibration of the tiny model, and kilns of one part."""

from __future__ import annotations

import pytest

from fluxkiln.compile.weights import calibration_action, component_digest
from fluxkiln.quantize.calibration import Sums, open_calibration
from fluxkiln.types import find_part
from tests.builds import altered

NAME, COMPONENT = "single.00", "transformer"


def one_part(small_build, scheme, name=NAME, target="cpu"):
    made = small_build(scheme=scheme, target=target)
    return altered(made, parts=(find_part(made.parts, name),))


@pytest.fixture(scope="session")
def calibrated(small_build, tmp_path_factory):
    """The store of all kilns gets a calibration of tiny-dev: random inputs, channel i with a size of its own."""
    import torch

    made = small_build(target="cpu")
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    random = torch.Generator().manual_seed(0)
    layers = [n for n, ref in made.checkpoint.tensors[COMPONENT].items() if len(ref.shape) == 2]
    with Sums(path, 64, len(layers)) as sums:
        for name in layers:
            height, width = made.checkpoint.tensors[COMPONENT][name].shape
            sizes = torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(width)))
            mixing = torch.randn(width // 4, width, generator=random) * sizes
            rows = torch.randn(400, width // 4, generator=random) @ mixing
            sums.add(COMPONENT, name, rows, torch.randn(400, height, generator=random))
        sums.finish(
            {"components": {COMPONENT: component_digest(made.checkpoint.digests, COMPONENT)}, "facts": {"prompts": 0}}
        )
    blob = made.cache.store.add_file(path)
    action = calibration_action(COMPONENT, component_digest(made.checkpoint.digests, COMPONENT))
    made.cache.record(action, {"calibration": blob}, {})
    return open_calibration(made.cache.store.path(blob.digest), blob.digest)
