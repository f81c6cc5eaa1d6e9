"""What tests share: what each marker needs, and the compiler's environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxkiln.compile.tpu_mlir_env import TpuMlirEnv, default_tpu_mlir_root, find_tpu_mlir

REGISTRY_VARIABLE = "FLUXKILN_TEST_REGISTRY"

# Nothing is fetched in a test: all checkpoints are synthetic.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, and say why."""
    missing = {}
    if find_tpu_mlir(default_tpu_mlir_root()) is None:
        missing["tpu_mlir"] = f"no finished TPU-MLIR environment in {default_tpu_mlir_root()}: run `make env-tpu-mlir`"
    if not os.environ.get(REGISTRY_VARIABLE):
        missing["registry"] = f"no registry: set {REGISTRY_VARIABLE}=host:port"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The source checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tpu_mlir() -> TpuMlirEnv:
    """The finished TPU-MLIR environment; for tests marked `tpu_mlir`."""
    env = find_tpu_mlir(default_tpu_mlir_root())
    assert env is not None, "the test lacks the marker tpu_mlir"
    return env
