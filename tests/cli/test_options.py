"""Prompts and seeds as the command line takes them, and bad input in words."""

from __future__ import annotations

import pytest

from fluxkiln.settings import parse_seeds, read_prompts


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff a kiln at night \n\n# not this\nein Töpfer\r\n".encode())
    assert read_prompts(file) == ("a kiln at night", "ein Töpfer")


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", (0,)), ("0-3,7", (0, 1, 2, 3, 7)), (" 5 4 ", (5, 4)), (str(2**63 - 1), (2**63 - 1,))]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "No such file or directory; give a text file with a prompt a line"),
        (b"", "has no prompt in it; write one a line"),
        (b"# only this\n\n", "has no prompt in it"),
        (b"\xff\xfe\x00a", "is no UTF-8 text"),
    ],
)
@pytest.mark.parametrize("command", [("build", "cpu"), ("calibrate", "tiny-dev"), ("generate", "--bundle", "x")])
def test_bad_prompts(fluxkiln, tmp_path, command, content, sentence):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    run = fluxkiln(*command, "--prompts", file)
    assert run.code == 2
    assert f"error: --prompts {file}" in run.err
    assert sentence in run.err


def test_images_are_compared_once(fluxkiln, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a kiln\na kiln\n")
    assert read_prompts(file) == ("a kiln", "a kiln")
    run = fluxkiln("build", "cpu", "--prompts", file)
    assert (run.code, "has 'a kiln' twice; write each prompt once" in run.err) == (2, True)


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ("", "'' has 0 seeds; give 1 to 256"),
        ("-1", "'-1' is no seed and no range"),
        ("one", "'one' is no seed and no range; write whole numbers from 0, 0-3,7 say"),
        ("3-1", "'3-1' must rise"),
        ("0-1000000", "must rise, over at most 256 seeds"),
        ("0-200,300-400", "has 302 seeds"),
        ("1,1", "has a seed twice"),
        (str(2**63), "is too large; a seed is at most"),
    ],
)
def test_bad_seeds(fluxkiln, seeds, sentence):
    run = fluxkiln("build", "cpu", f"--seeds={seeds}")
    assert run.code == 2
    assert sentence in run.err


def test_images_need_all_of_the_model_and_verification(fluxkiln):
    run = fluxkiln("build", "cpu", "--seeds", "1", "--components", "transformer")
    assert (run.code, "whole images" in run.err, "leave --components out" in run.err) == (2, True, True)
    run = fluxkiln("build", "cpu", "--seeds", "1", "--no-verify")
    assert (run.code, "--no-verify leaves out" in run.err) == (2, True)
    assert fluxkiln("build", "cpu", "--steps", "0").code == 2
