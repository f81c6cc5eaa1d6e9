"""What others register: found, checked, and left out with a sentence where it is unsound."""

from __future__ import annotations

import pytest

from fluxkiln.compile import targets, toolchain
from fluxkiln.compile.target import Target
from fluxkiln.compile.toolchain import Toolchain
from fluxkiln.patches import model, registry
from fluxkiln.patches.model import Model
from fluxkiln.plugins import find_plugins
from tests.examples.distributions import fluxkiln, register, run_python

# of each group: what a sound plug-in is, and an object that lacks something
SOUND = {
    toolchain.GROUP: "from fluxkiln.compile.toolchains.onnxruntime.toolchain import OnnxRuntime as Base\n",
    registry.GROUP: "from fluxkiln.patches.flux1.model import Flux1 as Base\n",
    targets.GROUP: "from fluxkiln.compile.targets.cpu import TARGET\nfrom dataclasses import replace\n",
}
PROTOCOLS = {toolchain.GROUP: Toolchain, registry.GROUP: Model, targets.GROUP: Target}
APIS = {toolchain.GROUP: toolchain.API, registry.GROUP: model.API, targets.GROUP: None}
TAKEN = {toolchain.GROUP: "onnxruntime", registry.GROUP: "flux1", targets.GROUP: "cpu"}


def source(group: str, name: object, **attributes: object) -> str:
    """A module whose `PLUGIN` is sound but for these attributes."""
    if group == targets.GROUP:
        return f"{SOUND[group]}PLUGIN = replace(TARGET, name={name!r})\n"
    body = "".join(f"    {key} = {value!r}\n" for key, value in {"name": name, **attributes}.items())
    return f"{SOUND[group]}class Plugin(Base):\n{body}PLUGIN = Plugin()\n"


LACKING = {
    toolchain.GROUP: "it lacks any_shapes, ",
    registry.GROUP: "it lacks activation_bytes, adapted, build_parallel_part,",
    targets.GROUP: "it lacks chip, device_bytes, float_norms, graph_format,",
}
FAULTS = {
    "lacks": ("class Plugin:\n    api = 1\n    name = 'half'\nPLUGIN = Plugin()\n", ""),
    "fails": ("import nothing_of_the_kind\n", "it cannot be imported (ModuleNotFoundError: No module named "
              "'nothing_of_the_kind'); mend or uninstall it"),
    "leaves": ("import sys\nsys.exit('not on this machine')\n", "it cannot be imported (SystemExit: not on this "
               "machine); mend or uninstall it"),
    "absent": ("", "it cannot be imported (AttributeError: "),
    "aclass": ("class PLUGIN: pass\n", "it is the class PLUGIN, not an object of it; have the entry point name one"),
}  # fmt: skip


def add(site, name: str, group: str, text: str) -> None:
    (site / f"plugin_{name}.py").write_text(text)
    register(site, f"dist-{name}", "2.1", {group: {name: f"plugin_{name}:PLUGIN"}})


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def find(group: str) -> list[object]:
    return [found.name for found in find_plugins(group, PROTOCOLS[group], APIS[group], {TAKEN[group]})]


@pytest.mark.parametrize("group", PROTOCOLS)
def test_what_is_sound_is_found_by_its_name(group, site, capsys):
    add(site, f"other_{group[9:]}", group, source(group, "other"))
    assert find(group) == ["other"]
    assert capsys.readouterr() == ("", "")


def test_a_class_of_its_own_that_has_everything_will_do(site):
    """What a protocol asks for counts, not what a class is derived from."""
    text = (
        "from fluxkiln.patches.model import Model\nfrom fluxkiln.plugins import _members\n"
        "class Own: pass\nfor member in _members(Model): setattr(Own, member, None)\n"
        "Own.api, Own.name = 1, 'own'\nPLUGIN = Own()\n"
    )
    add(site, "own", registry.GROUP, text)
    assert find(registry.GROUP) == ["own"]


@pytest.mark.parametrize("group", PROTOCOLS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_left_out(fault, group, site, capsys):
    text, why = FAULTS[fault]
    add(site, f"{fault}_{group[9:]}", group, text)
    add(site, f"sound_{group[9:]}", group, source(group, "sound"))
    assert find(group) == ["sound"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {fault}_{group[9:]} of dist-{fault}_{group[9:]} 2.1 is left out of {group}: ")
    assert (why or LACKING[group]) in line


@pytest.mark.parametrize("group", PROTOCOLS)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("taken", "already; uninstall one of them"),
        (7, "its name is 7, not a word; ask its makers for a version with one"),
    ],
)
def test_names_are_words_and_taken_once(name, why, group, site, capsys):
    given = TAKEN[group] if name == "taken" else name
    add(site, f"named{name}_{group[9:]}", group, source(group, given))
    assert find(group) == []
    assert why in capsys.readouterr().err


def test_two_of_one_name_are_one(site, capsys):
    add(site, "first", targets.GROUP, source(targets.GROUP, "same"))
    add(site, "second", targets.GROUP, source(targets.GROUP, "same"))
    assert find(targets.GROUP) == ["same"]
    assert capsys.readouterr().err == (
        "warning: second of dist-second 2.1 is left out of fluxkiln.targets: there is a same already; uninstall one of "
        "them\n"
    )


@pytest.mark.parametrize("group", [toolchain.GROUP, registry.GROUP])
def test_another_version_of_the_interface(group, site, capsys):
    add(site, f"newer_{group[9:]}", group, source(group, "newer", api=99))
    assert find(group) == []
    assert capsys.readouterr().err.endswith(
        "it was written for version 99 of the interface, this has 1; install versions of both that fit\n"
    )


def test_a_toolchain_that_does_not_make_anything(site, capsys):
    """What the protocol has no answer for must be there: it is an abstract method."""
    text = "from fluxkiln.compile.toolchain import Toolchain\nclass Half(Toolchain):\n    api, name = 1, 'half'\n"
    add(site, "abstract", toolchain.GROUP, text + "PLUGIN = Half()\n")
    assert find(toolchain.GROUP) == []
    assert "TypeError: Can't instantiate abstract class Half" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rest_of_fluxkiln_goes_on(tmp_path):
    """Every fault at once, of every group: each is told once, and what is not concerned works."""
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    site.mkdir()
    for group in PROTOCOLS:
        for fault, (text, _) in FAULTS.items():
            add(site, f"{fault}_{group[9:]}", group, text)
        add(site, f"taken_{group[9:]}", group, source(group, TAKEN[group]))
    # a sound target of a toolchain that was left out
    lost = f"{SOUND[targets.GROUP]}PLUGIN = replace(TARGET, name='lost', toolchain='half')\n"
    add(site, "lost", targets.GROUP, lost)
    run = fluxkiln(site, work, "plan", "cpu")
    assert "memory peak bytes" in run.out
    names = [line.split()[1] for line in run.err.splitlines() if line.startswith("warning: ")]
    assert len(names) == len(set(names))
    assert {f"{fault}_models" for fault in FAULTS} <= set(names)
    doctor = fluxkiln(site, work, "doctor")
    told = [line.split()[1] for line in doctor.err.splitlines()]
    assert sorted(told) == sorted(
        f"{fault}_{group}" for fault in (*FAULTS, "taken") for group in ("targets", "toolchains")
    )
    assert "ready: fluxkiln build cpu" in doctor.out
    assert "cpu" in fluxkiln(site, work, "build", "--help").out
    assert "cpu" in fluxkiln(site, work, "generate", "--help").out
    lost = run_python(site, work, "-m", "fluxkiln", "plan", "lost")
    assert lost.code == 2
    assert "no toolchain is called 'half'; there are neuron, onnxruntime, tpu_mlir: install" in lost.err
