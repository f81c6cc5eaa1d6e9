"""Both examples installed, and the three builds that they make possible, with one store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.examples.distributions import fluxkiln, install
from tests.ran import Run

# target and model, and the form of the transformer: the shorter one of FLUX.1, which has no other block order to prove
BUILDS: Mapping[str, tuple[str, ...]] = {
    "toy model": ("cpu", "--model", "tiny-toy"),
    "toy target": ("toy", "--model", "tiny-dev", "--modulation", "inline"),
    "both": ("toy", "--model", "tiny-toy"),
}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed distributions: the toy model and the toy target."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "toy_model")
    install(folder, "toy_target")
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that commands run in."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def built(site: Path, work: Path) -> Callable[[str], Run]:
    """Name of a build -> what it left, made once a session; its document names bundle and report."""

    @cache
    def make(name: str) -> Run:
        return fluxkiln(site, work, "build", *BUILDS[name], "--build-dir", "build", "--store", "store", "--json")

    return make
