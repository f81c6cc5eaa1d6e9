"""What make hands over to the command: text as it was given, whatever a shell or make would make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fluxkiln.cli import main as command_line
from fluxkiln.settings import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
NASTY = 'it\'s "a" $HOME $(HOME) $(shell touch made) `touch made` ${HOME}; touch made #\n-second line'
BUNDLE = "/a folder/it's $5"
COMMAND = f"""#!{sys.executable}
import json, sys
from pathlib import Path
with Path(sys.argv[0]).with_name("calls").open("a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
print(json.dumps({{"bundle": {BUNDLE!r}}}))
"""


@pytest.fixture
def make(tmp_path):
    """(words of a make command, environment) -> exit code, errors, and the arguments of every command it started."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    (folder / "fluxkiln").write_text(COMMAND)
    (folder / "fluxkiln").chmod(0o755)
    (folder / "python").symlink_to(sys.executable)

    def run(*words, **variables):
        made = f"{tmp_path}/env/made-from.sha256"
        done = subprocess.run(
            ["make", "-f", str(ROOT / "Makefile"), "-o", made, f"VENV={tmp_path}/env", *words],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | variables,
        )  # fmt: skip
        calls = folder / "calls"
        seen = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        assert not (tmp_path / "made").exists(), "a part of the text was executed"
        return done.returncode, done.stderr, seen

    return run


def test_a_prompt_arrives_as_it_was_given(make):
    given = ("generate", f"PROMPT={NASTY}", "STEPS=3", "SEED=7", f"OUT={NASTY.splitlines()[0]}", "BUNDLE=x y")
    code, err, calls = make(*given)
    assert (code, err) == (0, "")
    expected = ["--bundle=x y", "--steps=3", f"--out={NASTY.splitlines()[0]}", "--seed=7", "--", NASTY]
    assert calls[0][0] == "generate"
    assert sorted(calls[0][1:-2]) == sorted(expected[:-2])
    assert calls[0][-2:] == expected[-2:]


def test_a_prompt_of_the_environment_arrives_too(make):
    _, _, calls = make("generate", "BUNDLE=x", PROMPT=NASTY)
    assert calls == [["generate", "--bundle=x", "--", NASTY]]


def test_every_variable_arrives_as_its_option(make):
    options = [option for option in OPTIONS.values() if option.make]
    words = {option.flag: f"--{option.flag}=a $1 {option.flag}" for option in options}
    variables = [f"{flag.upper()}=a $1 {flag}" for flag in words]
    make("cpu", *variables)
    (whole, built, _) = make("generate", "PROMPT=a", *variables)[2]
    assert whole[:2] == built[:2] == ["build", "cpu"]
    assert sorted(whole[2:]) == sorted(words.values())
    # steps and prompts are the image's then, not those of the build's reference
    assert sorted(built[2:]) == sorted([*(words[one.flag] for one in options if one.make == "build"), "--json"])


@pytest.mark.parametrize(
    ("given", "target"),
    [((), "cpu"), (("RUNTIME=onnxruntime",), "cpu"), (("RUNTIME=openvino",), "openvino"), (("RUNTIME=it's",), "it's")],
)
def test_the_runtime_of_a_cpu(make, given, target):
    assert make("cpu", *given)[2] == [["build", target]]


def test_without_a_bundle_the_build_of_the_variables_is_made_first(make):
    _, _, calls = make("generate", "PROMPT=a", "MODEL=my $1 model", "SIZE=64x64", "STEPS=2", "TARGET=bm1684x")
    build, generate = calls
    # the steps are the image's, not those of the build's reference
    assert build == ["build", "bm1684x", "--model=my $1 model", "--size=64x64", "--json"]
    assert generate == ["generate", f"--bundle={BUNDLE}", "--steps=2", "--", "a"]


def test_a_build_that_fails_makes_no_image(make, tmp_path):
    (tmp_path / "env" / "bin" / "fluxkiln").write_text(f"{COMMAND}sys.exit(sys.argv[1] == 'build')\n")
    code, _, calls = make("generate", "PROMPT=a")
    assert code != 0
    assert [call[0] for call in calls] == ["build"]


def test_a_file_of_prompts_stands_for_one(make):
    code, err, calls = make("generate", "BUNDLE=x")
    assert (code, calls) == (2, [])
    assert err.startswith("error: there is no prompt")
    assert make("generate", "BUNDLE=x", "PROMPTS=list.txt")[2] == [["generate", "--bundle=x", "--prompts=list.txt"]]


def test_publish_wants_a_registry(make):
    code, err, calls = make("publish", "BUNDLE=x")
    assert (code, calls) == (2, [])
    assert err.startswith("error: no registry is named; give one: REGISTRY=")
    assert make("publish", "BUNDLE=x", "REGISTRY=a/b:c")[2] == [["publish", "x", "a/b:c"]]


def test_serve(make):
    assert make("serve", "PORT=0", "BUNDLE=x")[2] == [["serve", "--bundle=x", "--port=0"]]


def test_debug(make):
    assert make("debug")[0] == 2
    assert make("debug", "PART=-x $1", "STEP=1", "TARGET=cpu", "MODEL=it's")[2] == [
        ["debug", "--target=cpu", "--step=1", "--model=it's", "--", "-x $1"]
    ]
    assert make("debug", "PART=head")[2][-1] == ["debug", "--target=bm1684x", "--", "head"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("generate", ("BUNDLE=x", "PROMPT=a", "STEPS=1", "SEED=1", "OUT=o", "PROMPTS=f")),
        ("serve", ("BUNDLE=x", "PORT=1")),
        ("debug", ("PART=a", "STEP=1", "TARGET=cpu")),
    ],
)
def test_the_command_has_these_options(make, name, words):
    command = command_line.fluxkiln_command.get_command(click.Context(command_line.fluxkiln_command), name)
    known = {option for parameter in command.params for option in parameter.opts}
    ((_, *given),) = make(name, *words)[2]
    assert {word.split("=")[0] for word in given if word.startswith("--") and word != "--"} <= known


def test_help_lists_every_target():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if line}
    assert {"generate", "serve", "debug", "bm1684x", "report"} <= listed
