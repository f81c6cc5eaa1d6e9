"""Toolchains, models and targets of others that cannot be used: each is told once, and the rest of fluxkiln goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fluxkiln.compile import targets, toolchain
from fluxkiln.patches import model, registry
from tests.distributions import install
from tests.examples.distributions import fluxkiln, run_python
from tests.ran import Run

pytestmark = pytest.mark.slow

# what is sound but for some attributes
_DERIVED = "class Plugin(Base):\n    name = {name!r}\n    api = {api!r}\nPLUGIN = Plugin()\n"
SOUND: Mapping[str, str] = {
    toolchain.GROUP: f"from fluxkiln.compile.toolchains.onnxruntime.toolchain import OnnxRuntime as Base\n{_DERIVED}",
    registry.GROUP: f"from fluxkiln.patches.flux1.model import Flux1 as Base\n{_DERIVED}",
    targets.GROUP: "from dataclasses import replace\nfrom fluxkiln.compile.targets.cpu import TARGET\n"
    "PLUGIN = replace(TARGET, name={name!r})\n",
}
TAKEN = {toolchain.GROUP: "onnxruntime", registry.GROUP: "flux1", targets.GROUP: "cpu"}
APIS = {toolchain.GROUP: toolchain.API, registry.GROUP: model.API}
# fault -> a module with it, of any group, and what is said of it
FAULTS: Mapping[str, tuple[str, str]] = {
    "lacks": ("class Plugin: api, name = {api}, 'half'\nPLUGIN = Plugin()\n", "; ask its makers for a version that has "
              "what the interface has"),
    "fails": ("import nothing_like_it\n", "it cannot be imported (ModuleNotFoundError: No module named "
              "'nothing_like_it'); mend or uninstall it"),
    "absent": ("", "has no attribute 'PLUGIN'); mend or uninstall it"),
    "class": ("class PLUGIN: pass\n", "it is the class PLUGIN, not an object of it; have the entry point name one"),
}  # fmt: skip
LACKS = {toolchain.GROUP: "open_rungs", registry.GROUP: "build_part", targets.GROUP: "toolchain"}


def add(site: Path, fault: str, group: str, text: str) -> str:
    """Install a module; what a warning calls it."""
    name = f"{fault}-{group.rpartition('.')[2]}"
    module = name.replace("-", "_")
    install(site, f"of-{name}", group, {name: f"{module}:PLUGIN"}, {module: text})
    return f"warning: {name} of of-{name} 1.0 is left out of {group}: "


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Beginning of each warning that has to come -> its end."""
    site = tmp_path_factory.mktemp("bad")
    expected = {}
    for group, sound in SOUND.items():
        for fault, (text, why) in FAULTS.items():
            expected[add(site, fault, group, text.format(api=APIS.get(group)))] = why
        taken = add(site, "taken", group, sound.format(name=TAKEN[group], api=APIS.get(group)))
        expected[taken] = f"there is a {TAKEN[group]} already; uninstall one of them"
        if group in APIS:
            other = add(site, "newer", group, sound.format(name="newer", api=99))
            expected[other] = (
                f"it was written for version 99 of the interface, this has {APIS[group]}; install versions of both "
                "that fit"
            )
        add(site, "sound", group, sound.format(name=f"sound_{group.rpartition('.')[2]}", api=APIS.get(group)))
    # a sound target whose toolchain is one of those that are left out
    add(
        site,
        "lost",
        targets.GROUP,
        SOUND[targets.GROUP].replace("name=", "toolchain='half', name=").format(name="lost"),
    )
    return {"": str(site), **expected}


@pytest.fixture(scope="module")
def site(told: Mapping[str, str]) -> Path:
    return Path(told[""])


def check(run: Run, told: Mapping[str, str], *groups: str) -> None:
    """Every warning of these groups is there once, and nothing else."""
    lines = run.err.splitlines()
    for start, why in told.items():
        if start and any(f"out of {group}: " in start for group in groups):
            (line,) = [line for line in lines if line.startswith(start)]
            assert line.endswith(why)
            assert not start.startswith("warning: lacks") or any(LACKS[group] in line for group in groups)
            lines.remove(line)
    assert not [line for line in lines if line.startswith(("warning", "error"))]


def test_a_plan_goes_on(site, told, tmp_path):
    run = fluxkiln(site, tmp_path, "plan", "cpu")
    assert "can be built here" in run.out
    check(run, told, registry.GROUP)


def test_doctor_goes_on(site, told, tmp_path):
    run = fluxkiln(site, tmp_path, "doctor")
    assert "ready: fluxkiln build cpu" in run.out
    assert "ready: fluxkiln build sound_targets" in run.out
    check(run, told, targets.GROUP, toolchain.GROUP)


def test_help_goes_on(site, tmp_path):
    assert "sound_targets" in fluxkiln(site, tmp_path, "build", "--help").out
    assert "sound_targets" in fluxkiln(site, tmp_path, "generate", "--help").out


def test_a_target_whose_toolchain_was_left_out_is_refused(site, tmp_path):
    run = run_python(site, tmp_path, "-m", "fluxkiln", "plan", "lost")
    assert run.code == 2
    assert "error: no toolchain is called 'half'; there are gguf, mlx, neuron, onnxruntime, openvino, tpu_mlir, " \
        "sound_toolchains: " \
        "install the distribution that the target belongs to" in run.err  # fmt: skip
