"""Rules of the source tree that no linter knows: who imports whom, what is imported early, names, lengths, pins."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fluxkiln"

# Rooms by height: a module imports what is in its own room or lower, never what is beside it.
GROUND = ("errors", "types", "files", "digests", "progress", "settings", "plugins")
HEIGHTS = {
    "ground": 0, "patches": 1, "quantize": 1, "artifacts": 1, "export": 2, "verify": 3, "compile": 4, "toolchains": 5,
    "build": 6, "debug": 7, "generate": 7, "cli": 8, "__main__": 9,
}  # fmt: skip

HEAVY = {
    "torch", "torchvision", "diffusers", "transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate",
    "onnx", "onnxruntime", "onnxscript", "onnx_ir", "numba", "numpy", "scipy", "skimage", "PIL", "rich", "jinja2",
    "sentencepiece", "psutil", "starlette", "uvicorn", "jax", "jaxlib", "torchax", "ml_dtypes",
}  # fmt: skip

MOST_LINES = 500
FORBIDDEN_FILES = re.compile(r"(^|_)(utils?|helpers?|common|misc|manager|handler)(_|$)")
FORBIDDEN_CLASSES = re.compile(r"(Manager|Handler|Helper|Utils?)$")


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def sources() -> list[Path]:
    """Modules of the package; not the stubs, which are no part of it."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "stubs" not in path.parts]


MODULES = {module_name(path): path for path in sources()}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module, own: str, is_package: bool) -> Iterator[tuple[ast.stmt, str]]:
    """Each import statement with each absolute name it may bind a module to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = own.split(".") if is_package else own.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in MODULES else base


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return {target for _, target in imported(parse(path), name, path.name == "__init__.py")}


def room_of(name: str) -> str:
    """The room of a module; of a toolchain's folder `toolchains.<name>`, which sees no other toolchain."""
    pieces = name.split(".")
    if len(pieces) == 1 or pieces[1] in GROUND:
        return "ground"
    if pieces[1:3] == ["verify", "debug"]:
        return "debug"
    if pieces[1:3] == ["compile", "toolchains"] and len(pieces) > 3:
        return f"toolchains.{pieces[3]}"
    return pieces[1]


def may_import(own: str, target: str) -> bool:
    """The dependency rule for two modules of the package."""
    mine, other = room_of(own), room_of(target)
    return mine == other or HEIGHTS[other.split(".")[0]] < HEIGHTS[mine.split(".")[0]]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_dependency_rule(name):
    wrong = [
        target for target in imports_of(name) if target.split(".")[0] == "fluxkiln" and not may_import(name, target)
    ]
    assert wrong == []


def test_every_module_has_a_place():
    assert {room_of(name).split(".")[0] for name in MODULES} <= set(HEIGHTS)


@pytest.mark.parametrize(
    ("own", "target"),
    [
        ("fluxkiln.errors", "fluxkiln.artifacts.store"),
        ("fluxkiln.quantize.pack", "fluxkiln.patches.patch"),
        ("fluxkiln.verify.ladder", "fluxkiln.compile.jobs"),
        ("fluxkiln.export.trace", "fluxkiln.cli.main"),
        ("fluxkiln.compile.jobs", "fluxkiln.compile.toolchains.neuron.make"),
        ("fluxkiln.compile.toolchains.neuron.make", "fluxkiln.compile.toolchains.tpu_mlir.cast"),
        ("fluxkiln.build.make", "fluxkiln.verify.debug.diagnosis"),
        ("fluxkiln.generate.painter", "fluxkiln.verify.debug.diagnosis"),
        ("fluxkiln.settings", "fluxkiln.build.make"),
    ],
)
def test_dependency_rule_refuses(own, target):
    assert not may_import(own, target)


def test_relative_imports_are_seen():
    tree = ast.parse("from ..cli import main\nfrom . import pack\n")
    found = [target for _, target in imported(tree, "fluxkiln.quantize.store", is_package=False)]
    assert [target.split(".")[1] for target in found] == ["cli", "quantize"]


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.stmt):
            yield node
        todo += ast.iter_child_nodes(node)


def early_imports(name: str) -> set[str]:
    path = MODULES[name]
    now = {id(node) for node in at_import_time(parse(path))}
    return {target for node, target in imported(parse(path), name, path.name == "__init__.py") if id(node) in now}


def test_command_line_starts_without_heavy_modules():
    todo = [name for name in MODULES if name.startswith("fluxkiln.cli")]
    seen: dict[str, str] = dict.fromkeys(todo, "the command line")
    heavy = []
    while todo:
        name = todo.pop()
        for target in early_imports(name):
            if target.split(".")[0] in HEAVY:
                heavy.append(f"{name} (imported by {seen[name]}) imports {target} at its top")
            parents = [".".join(target.split(".")[: i + 1]) for i in range(target.count(".") + 1)]
            for module in parents:
                if module in MODULES and module not in seen:
                    seen[module] = name
                    todo.append(module)
    assert heavy == []


def test_early_imports_are_told_from_late_ones():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\nimport numpy\nif TYPE_CHECKING:\n    import torch\n"
        "try:\n    import onnx\nexcept ImportError:\n    pass\nclass C:\n    import scipy\n"
        "    def f(self):\n        import rich\n"
    )
    now = {id(node) for node in at_import_time(tree)}
    found = {target for node, target in imported(tree, "fluxkiln.x", is_package=False) if id(node) in now}
    assert found == {"typing", "numpy", "onnx", "scipy"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_length_and_names(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: two rooms would be clearer"
    assert not FORBIDDEN_FILES.search(path.stem), "the name says nothing about what is in it"
    classes = [node.name for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if FORBIDDEN_CLASSES.search(name)] == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_and_no_bare_exception(path):
    for node in ast.walk(parse(path)):
        # of a dataclass it is a field; functions that start processes are lower case
        if isinstance(node, ast.Call) and not ast.unparse(node.func).split(".")[-1][0].isupper():
            assert not any(word.arg == "shell" for word in node.keywords), f"line {node.lineno}: shell="
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            assert ast.unparse(node.exc.func) not in ("Exception", "BaseException"), f"line {node.lineno}"


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalised(line.split("==")[0]) for line in pins if "==" in line}
    assert [line for line in pins if line and not line.startswith("#") and "==" not in line] == []
    assert [name for name in wanted if normalised(re.split(r"[<>=!~ ;\[]", name)[0]) not in pinned] == []


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
