"""What others register is found; what cannot be used is left out with one sentence, and the rest goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from fluxkiln.compile.toolchain import API, Toolchain
from fluxkiln.patches.model import Model
from fluxkiln.plugins import find_plugins
from tests.distributions import install

GROUP = "fluxkiln.tests"
SOUND = """
class Pot:
    api, name, glaze = 3, "pot", "celadon"
    def fire(self): return 1280
POT = Pot()
"""


class Ware(Protocol):
    """What plug-ins of these tests are."""

    api: int
    name: str
    glaze: str

    def fire(self) -> int:
        """Degrees."""

    def wash(self) -> int:
        """Times."""
        return 1


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of `sys.path`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for module in [
        name for name, one in sys.modules.items() if str(getattr(one, "__file__", "")).startswith(str(tmp_path))
    ]:
        del sys.modules[module]


def add(shelf: Path, name: str, source: str, value: str = "POT", entry: str = "pot") -> None:
    module = name.replace("-", "_")
    install(shelf, name, GROUP, {entry: f"{module}:{value}"}, {module: source})


def find(taken: tuple[str, ...] = ()) -> list[Any]:
    return [found.name for found in find_plugins(GROUP, Ware, 3, taken)]


def test_what_has_everything_is_found(shelf, capfd):
    add(shelf, "pots", SOUND.replace("def fire", "def wash(self): return 2\n    def fire"))
    assert find() == ["pot"]
    assert capfd.readouterr() == ("", "")


WASHES = SOUND.replace("def fire", "def wash(self): return 2\n    def fire")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (SOUND, "it lacks wash; ask its makers for a version that has what the interface has"),
        (WASHES.replace("fire", "bake").replace("wash", "rinse"), "it lacks fire, wash; ask its makers"),
        (WASHES.replace(', glaze = 3, "pot", "celadon"', ' = 3, "pot"'), "it lacks glaze; ask its makers"),
        (WASHES.replace("3,", "2,"), "it was written for version 2 of the interface, this has 3; install versions of"),
        ("POT = object()", "it was written for version None of the interface, this has 3; install versions of both"),
        ("import no_such_clay", "it cannot be imported (ModuleNotFoundError: No module named 'no_such_clay'); mend or"),
        ("POT = 1 / 0", "it cannot be imported (ZeroDivisionError: division by zero); mend or uninstall it"),
        ("BOWL = 1", "it cannot be imported (AttributeError: module 'pots_of_clay' has no attribute 'POT')"),
        (WASHES.replace("POT = Pot()", "POT = Pot"), "it is the class Pot, not an object of it; have the entry point"),
        (WASHES.replace('"pot"', "7"), "its name is 7, not a word; ask its makers for a version with one"),
        ("raise SystemExit('no clay')", "it cannot be imported (SystemExit: no clay); mend or uninstall it"),
        (WASHES.replace('"pot"', '"kettle"'), "there is a kettle already; uninstall one of them"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_left_out_with_one_sentence(shelf, capfd, source, why):
    add(shelf, "pots-of-clay", source)
    add(shelf, "sound", WASHES.replace('"pot"', '"sound"'), entry="sound")
    assert find(taken=("kettle",)) == ["sound"]
    out, told = capfd.readouterr()
    assert out == ""
    assert told.startswith(f"warning: pot of pots-of-clay 1.0 is left out of {GROUP}: ")
    assert why in told
    assert told.count("\n") == 1


def test_of_two_with_one_name_the_first_counts(shelf, capfd):
    add(shelf, "pots-a", WASHES, entry="a")
    add(shelf, "pots-b", WASHES, entry="b")
    assert find() == ["pot"]
    assert f"b of pots-b 1.0 is left out of {GROUP}: there is a pot already" in capfd.readouterr().err


def test_a_method_that_is_the_protocols_own_is_lacking_where_it_does_nothing(shelf, capfd):
    """Whoever derives from a protocol has all its names."""
    base = (
        "from tests.test_plugins import Ware\nclass Pot(Ware):\n    api, name, glaze = 3, 'pot', 'ash'\n{}POT = Pot()\n"
    )
    add(shelf, "idle", base.format(""))
    assert find() == []
    assert "it lacks fire; ask its makers" in capfd.readouterr().err
    add(shelf, "busy", base.format("    def fire(self): return 900\n"), entry="busy")
    assert find() == ["pot"]


@pytest.mark.parametrize(
    ("protocol", "lacking"),
    [
        (Toolchain, ("open_rungs", "jobs", "make", "open_executor")),
        (Model, ("build_part", "cuts", "list_parts", "render")),
    ],
)
def test_an_empty_one_lacks_what_a_build_needs(shelf, capfd, protocol, lacking):
    base = f"from {protocol.__module__} import {protocol.__name__} as Base\nclass Pot(Base): api, name = {API}, 'pot'\n"
    add(shelf, "empty", f"{base}POT = Pot()\n")
    assert find_plugins(GROUP, protocol, API, ()) == ()
    told = capfd.readouterr().err
    assert f"pot of empty 1.0 is left out of {GROUP}: it lacks " in told
    named = told.partition("lacks ")[2].partition(";")[0].split(", ")
    assert set(lacking) <= set(named)
    assert not {"tools", "label", "report", "name"} & set(named), "these have a body or were given"


@pytest.mark.parametrize(
    ("group", "command", "listed"),
    [("fluxkiln.models", "patches", "patches"), ("fluxkiln.toolchains", "doctor", "tools"),
     ("fluxkiln.targets", "doctor", "tools")],
)  # fmt: skip
def test_commands_go_on_without_a_broken_one(tmp_path, repository, group, command, listed):
    install(tmp_path, "broken-clay", group, {"clay": "broken_clay:CLAY"}, {"broken_clay": "raise OSError('no kiln')"})
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{repository}"}
    argv = [sys.executable, "-m", "fluxkiln", command, "--json"]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)[listed]) > 5
    told = (
        f"warning: clay of broken-clay 1.0 is left out of {group}: it cannot be imported (OSError: no kiln); "
        "mend or uninstall it"
    )
    assert done.stderr.count("broken-clay") == done.stderr.count(told) == 1
