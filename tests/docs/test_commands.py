"""Commands that the pages show: each can be read as it stands, and is run here or says why it is not."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from bench.__main__ import NAMES
from fluxkiln.cli.main import fluxkiln_command, main
from fluxkiln.cli.output import Output
from fluxkiln.errors import UsageError
from tests.docs.pages import PAGES, ROOT, without_fences

PROGRAMS = ("fluxkiln", "make", "python", "pip", "source", "bash", "openssl", "mflux-generate")
# What is not run here, by the whole command -> why.
NOT_RUN = {
    r"fluxkiln plan bm1684x --model black-forest-labs/.*": "asks where Hugging Face's cache is; run in test_source.py",
    r".*black-forest-labs.*|.*MODEL=\.\.\..*": "trained FLUX.1 weights are gated",
    r".*registry\.example.*": "no such registry; tests/artifacts/registry push to a real one",
    r"make (bm16\w+|generate|cpu|trn1).*": "minutes; tests/build/test_make.py builds, tests/cli/test_make.py is make",
    r"make gguf .*|fluxkiln build gguf .*": "minutes; tests/compile/toolchains/gguf build for it",
    r"make mlx .*|mflux-generate .*|.*txt2image\.py.*": "programs for Apple's machines; tests/compile/toolchains/mlx",
    r"fluxkiln mould .*": "minutes of compiling; tests/build/test_mould_archive.py",
    r"fluxkiln (build|debug) .*bm1684x.*": "minutes of compiling; tests/build/test_make.py, tests/cli/test_debug.py",
    r"fluxkiln (generate|serve) --bundle build/cpu/.*": "of the bundle of `make cpu`; tests/generate",
    r"fluxkiln generate --bundle build/mlx_example/.*": "of a bundle for MLX; tests/compile/toolchains/mlx",
    r"fluxkiln fuse MODEL .*": "of somebody's LoRA; tests/export/test_adapter.py",
    r"fluxkiln train .*|fluxkiln judge .*": "minutes to hours of training; tests/train, tests/build/test_judged.py",
    r".*\btoy\b.*|.*tiny-toy.*": "of a distribution that test_adding.py installs, and runs them with",
    r"source \.venv/bin/activate": "of the shell",
    r"make env": "installs everything; `make` does it first",
    r"fluxkiln \w+ .*/models/FLUX\.1-dev.*": "trained FLUX.1 weights are gated",
    r"pip install .*": "installs; tests/generate/test_runtime.py has an environment of the kind",
    r"fluxkiln (generate --bundle|parity) flux .*": "on a board or an instance; tests/generate has other executors",
}


def commands(page: Path) -> list[str]:
    """The commands in a page's indented blocks, without what a comment says."""
    text = without_fences(page)
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    found = []
    for block in blocks:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            bare = re.sub(r"\s+#.*$", "", line.strip())
            words = [word for word in bare.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
            if line.startswith("    ") and not line.startswith("     ") and words and words[0] in PROGRAMS:
                found.append(bare)
    return found


EVERY = [(page, command) for page in PAGES for command in commands(page)]


def read(command: str) -> None:
    """Read a command as the program that it names would, and start nothing; an error says what it does not take."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "fluxkiln":
        read_fluxkiln(words[1:])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            name, given, _ = word.partition("=")
            known = rf"\b{name}\b" if given else rf"^(\S+ )*{re.escape(name)}( \S+)*:"
            if not re.search(known, makefile, re.MULTILINE):
                raise UsageError(f"make knows no {word}")
    elif words[:2] == ["python", "-m"]:
        if importlib.util.find_spec(words[2]) is None:
            raise UsageError(f"no module is called {words[2]}")
        if words[2] == "bench" and (unknown := {*words[3:]} - {*NAMES, "--write", "NAME"}):
            raise UsageError(f"no figure is called {unknown}")


def read_fluxkiln(words: list[str]) -> None:
    command: click.Command = fluxkiln_command
    context = command.make_context("fluxkiln", [*words], obj=Output())
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command = found
        context = command.make_context(name, [*words], parent=context)


def why_not(command: str) -> str:
    return next((why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)), "")


def test_there_are_commands():
    assert len(EVERY) > 30
    assert {page.name for page, _ in EVERY} > {"README.md", "targets.md", "commands.md"}


@pytest.mark.parametrize(("page", "command"), EVERY, ids=[f"{page.name}: {command}" for page, command in EVERY])
def test_a_command_can_be_read(page, command):
    read(command)


@pytest.mark.parametrize(
    "command",
    ["fluxkiln bake", "fluxkiln build cpu --sise 32x32", "fluxkiln mould melt", "make cakes", "make cpu SISE=1",
     "python -m bench speed", "python -m bunch"],
)  # fmt: skip
def test_a_command_that_there_is_not_is_seen(command):
    with pytest.raises((UsageError, click.ClickException)):
        read(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist(page):
    names = re.findall(r"`(?:\.venv/bin/)?fluxkiln ([a-z]+)", page.read_text(encoding="utf-8"))
    assert sorted({*names} - {*fluxkiln_command.list_commands(click.Context(fluxkiln_command))}) == []


def test_reasons_are_for_commands_that_there_are():
    assert [pattern for pattern in NOT_RUN if not any(re.fullmatch(pattern, command) for _, command in EVERY)] == []


@pytest.mark.parametrize("command", sorted({command for _, command in EVERY if not why_not(command)}))
def test_the_others_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fluxkiln.build.plan.free_bytes", lambda place: 10**15)
    monkeypatch.setattr("fluxkiln.build.plan.available_memory", lambda: 10**12)
    words = shlex.split(command)
    assert words[0] == "fluxkiln", f"say in NOT_RUN why {command!r} is not run"
    assert main(words[1:]) == 0, capsys.readouterr().err


def test_names_of_files_in_the_reasons_are_there():
    for why in NOT_RUN.values():
        assert all((ROOT / name).exists() for name in re.findall(r"tests/[\w/.]+\w", why)), why
