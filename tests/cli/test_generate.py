"""`fluxkiln generate` and `serve` as commands: files, documents, refusals. Parts run in PyTorch here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.compile import toolchain
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import TpuMlir
from fluxkiln.generate.painter import make_grid
from tests.eager import Eager, make_bundle
from tests.hostile.forged import forge


def read_facts(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path) as image:
        image.load()
        return {name: str(text) for name, text in image.text.items()}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    return make_bundle(tiny_checkpoint(), tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def generate(fluxkiln, folder, tiny_checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "open_executor", lambda bundle, *_, **__: Eager(tiny_checkpoint(), bundle))
    return lambda *arguments: fluxkiln("generate", "--bundle", folder, *arguments)


def test_images_grid_and_document(generate, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\nzwei Öfen\n\n  a river  \n", encoding="utf-8")
    run = generate(
        "a kiln", "--prompts", prompts, "--n-images", 2, "--seed", 7, "--steps", 1, "--rows", 2, "--guidance", 2.5,
        "--prompt-2", "word " * 40, "--size", "64x64", "--save-latents", "--out", "out", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    document = run.document
    assert [image["seed"] for image in document["images"]] == [7, 8] * 3
    assert [image["prompt"] for image in document["images"][::2]] == ["a kiln", "zwei Öfen", "a river"]
    facts = read_facts(tmp_path / "work" / document["images"][3]["file"])
    assert facts["prompt"] == "zwei Öfen"
    assert facts["prompt_2"] == "word " * 40
    assert (facts["seed"], facts["steps"], facts["guidance"]) == ("8", "1", "2.5")
    assert facts["bundle"] == document["digest"] == read_manifest(folder).digest
    latents = np.load(tmp_path / "work" / document["images"][0]["latents"])
    assert latents.shape == (1, 16, 64)
    assert read_facts(tmp_path / "work" / document["grid"])["prompt"] == "a kiln\nzwei Öfen\na river"
    assert {"check", "encode", "load", "denoise", "decode"} <= set(document["timings"])
    assert document["peak_memory"] > 1e8
    (note,) = document["notes"]
    assert note.startswith("T5 takes 32 tokens")
    assert note in run.err
    assert run.err.count("were cut") == 1
    assert "denoise: 6 done" in run.err


def test_one_image_into_one_file(generate, tmp_path):
    run = generate("a kiln", "--steps", 1, "--out", "pictures/one.png")
    assert run.code == 0, run.err
    assert (tmp_path / "work/pictures/one.png").is_file()
    assert "peak memory" in run.out
    assert "weights      random (synthetic): no kiln" in run.out
    again = generate("a kiln", "--steps", 1, "--out", "pictures/two.png")
    assert again.code == 0
    one, two = ((tmp_path / "work/pictures" / name).read_bytes() for name in ("one.png", "two.png"))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, ("there is no prompt", "--prompts FILE")),
        (("x", "--size", "128x128"), 2, ("size 128x128", "compiled for 64x64")),
        (("x", "--size", "big"), 2, ("big",)),
        (("x", "--tokens", 77), 2, ("77 text tokens", "32 text tokens")),
        (("x", "--steps", 0), 2, ("0 steps",)),
        (("x", "--steps", 65), 2, ("65 steps", "at most 64")),
        (("x", "--n-images", 0), 2, ("--n-images 0",)),
        (("x", "--rows", 2), 2, ("--rows 2", "1 image")),
        (("x", "y", "--out", "one.png"), 2, ("one file for 2 images",)),
        (("x", "--prompts", "none.txt"), 2, ("--prompts none.txt", "No such file")),
    ],
)
def test_what_is_refused(generate, arguments, code, words, tmp_path):
    run = generate(*arguments)
    assert run.code == code
    assert all(word in run.err for word in words), run.err
    assert "Traceback" not in run.err
    assert list((tmp_path / "work").iterdir()) == []


def test_a_builds_folder_is_its_bundle(generate, folder):
    # the later option counts
    run = generate("a kiln", "--bundle", folder.parent, "--steps", 1, "--json")
    assert run.code == 0, run.err
    assert run.document["bundle"] == str(folder)


def test_prompt_files_that_hold_none(generate, tmp_path):
    (tmp_path / "work/empty.txt").write_text("\n \n")
    (tmp_path / "work/binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "empty.txt has no prompt" in generate("--prompts", "empty.txt").err
    assert "no UTF-8 text" in generate("--prompts", "binary.txt").err


def test_a_damaged_bundle(fluxkiln, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer/vocab.json").write_bytes(b"{}")
    run = fluxkiln("generate", "--bundle", copy, "x", "--json")
    assert run.code == 4
    assert run.document["error"]["kind"] == "IntegrityError"
    assert "tokenizer/vocab.json: 2 bytes, the manifest says" in run.err


def test_executors_that_are_not_here(fluxkiln, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "a bundle for cpu is run by ort" in fluxkiln("generate", "--bundle", folder, "x", "--executor", "sail").err
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    forge(copy, lambda document: document.update(target="bm1684x"))
    assert "is said to be the net 'clip', it is called clip_00" in fluxkiln("generate", "--bundle", copy, "x").err
    monkeypatch.setattr(TpuMlir, "check_parts", lambda *_: None)
    monkeypatch.setitem(sys.modules, "sophon", None)
    run = fluxkiln("generate", "--bundle", copy, "x", "--executor", "sail")
    assert run.code == 5
    assert "sophon-sail" in run.err


@pytest.mark.parametrize("passed", [False, True])
def test_what_failed_its_parity_is_told_to_who_paints_with_it(generate, fluxkiln, folder, tmp_path, passed):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    parity = {"verified": True, "passed": passed, "rows": 3, "failed_rows": 1}
    forge(copy, lambda document: document.update(parity=document["parity"] | parity))
    run = fluxkiln("generate", "--bundle", copy, "x", "--steps", 1, "--out", "x.png")
    assert run.code == 0, run.err
    assert ("parity of this bundle failed: 1 of 3 comparisons" in run.err) is not passed


def test_a_port_in_use(fluxkiln, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = fluxkiln("serve", "--bundle", folder, "--port", port)
    assert run.code == 1
    assert f"port {port} of 127.0.0.1 is in use; give another with --port" in run.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--port", 70000), "port 70000"), (("--host", "no.such.host.invalid"), "host no.such.host.invalid")],
)
def test_addresses_that_do_not_exist(fluxkiln, folder, arguments, words):
    run = fluxkiln("serve", "--bundle", folder, *arguments)
    assert run.code == 2
    assert words in run.err


def test_serve_without_its_extra(fluxkiln, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    run = fluxkiln("serve", "--bundle", folder, "--port", 0)
    assert run.code == 5
    assert "fluxkiln[serve]" in run.err


def test_serve_ends_with_an_interrupt(folder, repository, tmp_path):
    """A real process: it says where it is, answers, and goes."""
    import signal
    import urllib.request

    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    script = (
        "import sys; sys.argv = ['fluxkiln', *sys.argv[1:]]\n"
        "import fluxkiln.compile.bundle as e, fluxkiln.cli.main as m\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "e.open_executor = lambda bundle, *_, **__: SimpleNamespace(name='none', facts={'runtime': 'a', 'device': 'b'},"
        " close=lambda: None)\n"
        "sys.exit(m.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "serve", "--bundle", str(folder), "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(repository), "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        text = ""
        assert process.stdout is not None
        while not text.rstrip().endswith("}"):
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            text += line
        url = json.loads(text)["url"]
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"<!doctype html>" in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode in (0, 130), errors
    assert "Traceback" not in errors


def test_a_grid_is_filled_row_by_row():
    images = [np.full((2, 3, 3), number, np.uint8) for number in range(3)]
    grid = make_grid(images, 2)
    assert grid.shape == (12, 14, 3)
    assert [grid[0, 0, 0], grid[0, 11, 0], grid[10, 0, 0], grid[10, 11, 0]] == [0, 1, 2, 255]
    assert grid[5, 5, 0] == 255


def test_no_command_takes_what_another_refuses(fluxkiln, folder, tmp_path, monkeypatch):
    """The graph of one block in the place of another's: all say the same of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def exchange(document):
        one, other = (part for part in document["parts"] if part["name"].startswith("double_modulation"))
        for key in ("file", "digest", "size"):
            one[key], other[key] = other[key], one[key]

    assert fluxkiln("verify", copy).code == 0
    forge(copy, exchange)
    for command in (
        ["verify", copy], ["inspect", copy], ["generate", "--bundle", copy, "x"],
        ["serve", "--bundle", copy, "--port", "0"], ["publish", copy, f"oci-layout:{tmp_path / 'layout'}:v1"],
        ["publish", copy, f"oci-layout:{tmp_path / 'layout'}"], ["diff", copy, folder], ["diff", folder, copy],
        ["judge", copy],
    ):  # fmt: skip
        run = fluxkiln(*command)
        assert run.code == 4, command
        assert "part double_modulation.00 is said to be the graph double_modulation.00 in" in run.err, command
    assert not (tmp_path / "layout/index.json").exists()
