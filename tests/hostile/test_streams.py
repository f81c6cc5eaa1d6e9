"""Output that is gone, arguments that are no text, names that steer a terminal: a sentence or silence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import fluxkiln
from fluxkiln.artifacts.store import _TAG, legal_tag
from fluxkiln.cli.output import visible
from fluxkiln.errors import SchemeError, UsageError
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.quantize.schemes import parse_schemes
from fluxkiln.settings import Settings
from tests.eager import make_bundle


def shell(line: str, *arguments: bytes, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run bash on a line in which $F is the program and "$@" its last arguments."""
    environment = {"F": f"{sys.executable} -m fluxkiln", "PATH": "/usr/bin:/bin", **variables}
    command = ["bash", "-o", "pipefail", "-c", line, "bash", *arguments]
    return subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$F --help | head -1", 0),
        ("$F --version >&-", 0),
        ("$F --version 2>&-", 0),
        ("$F --version <&- >&- 2>&-", 0),
        ("$F --version >/dev/full", 1),
        ("$F nonsense 2>&-", 2),
        ("$F nonsense 2>/dev/full", 2),
    ],
)
def test_output_can_be_gone(line, code):
    done = shell(line)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"bug" not in done.stderr
    assert done.stderr.count(b"\n") <= 1


def test_a_finished_check_is_no_failure_when_nobody_reads_it(tiny_checkpoint, tmp_path):
    bundle = make_bundle(tiny_checkpoint(), tmp_path / "made")
    for end, code in ((">&-", 0), ("2>&-", 0), ("| head -c 0", 0), ("--json | head -1", 0), (">/dev/full", 1)):
        done = shell(f'$F verify "$@" {end}', bytes(bundle), XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == code, (end, done.stderr)
        assert b"Traceback" not in done.stderr
        assert done.stderr.count(b"error: ") == code


def test_arguments_are_shown_as_text():
    done = shell('$F inspect "$@"', b"\xff\x1b[2J", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode in (1, 2, 4)
    assert b"\x1b" not in done.stderr
    assert done.stderr.startswith(b"error: ")
    assert b"bug" not in done.stderr


@pytest.mark.parametrize(("prompt", "words"), [(b"gr\xc3\xb6\xc3\x9fe", b"nowhere"), (b"gr\xf6", b"is no UTF-8 text")])
@pytest.mark.parametrize("command", ["generate --bundle nowhere", "build cpu --model nowhere --prompt"])
def test_a_prompt_is_text_whatever_the_locale(prompt, words, command):
    done = shell(f'$F {command} "$@"', prompt, LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 2
    assert words in done.stderr


def test_the_version_is_json():
    done = shell("$F --version --json")
    assert json.loads(done.stdout) == {"version": fluxkiln.__version__}


def test_what_steers_a_terminal_is_escaped():
    assert visible("a\x1b[31mb\r\x9b\u202e\udcffc\td\n") == "a\\x1b[31mb\\r\\x9b\\u202e\\udcffc\td\n"


@pytest.mark.parametrize("name", ["my model", "it's", "größe", "-x", "..x", "a//b", '"', "", "x" * 300, "a--b---c"])
def test_every_name_gives_a_tag(name):
    assert _TAG.fullmatch(legal_tag(f"{name}:cpu"))
    assert legal_tag(f"{name}:cpu") == legal_tag(f"{name}:cpu")
    assert legal_tag(name) != legal_tag(f"{name} ")


def test_a_legal_tag_stays():
    assert legal_tag("tiny-dev-w4bf16-32x32-16:cpu") == "tiny-dev-w4bf16-32x32-16:cpu"


@pytest.mark.parametrize(
    "changes", [{"seed": -1}, {"seed": 10**20}, {"jobs": 10**6}, {"steps": 10**9}, {"tokens": (10**9,)}]
)
def test_numbers_that_nobody_means(changes):
    with pytest.raises(UsageError):
        Settings("cpu", **changes)


def test_a_scheme_does_not_contradict_itself():
    with pytest.raises(SchemeError, match="head is given twice"):
        parse_schemes("W4BF16,head=F32,head=BF16", "W4BF16", MODEL.kinds)
