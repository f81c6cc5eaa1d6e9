"""Rules of the source tree that no linter knows: who imports whom, what is imported early, names, lengths, pins."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping, Set
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fluxkiln"

# Rooms by height: a module imports what is in its own room or lower, never what is beside it.
GROUND = ("errors", "types", "files", "digests", "documents", "progress", "settings", "plugins")
HEIGHTS = {
    "ground": 0, "patches": 1, "quantize": 1, "artifacts": 1, "scenes": 1, "export": 2, "verify": 3, "compile": 4,
    "train": 4, "toolchains": 5, "build": 6, "debug": 7, "generate": 7, "cli": 8, "__main__": 9,
}  # fmt: skip

HEAVY = {
    "torch", "torchvision", "diffusers", "transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate",
    "onnx", "onnxruntime", "onnxscript", "onnx_ir", "numba", "numpy", "scipy", "skimage", "PIL", "rich", "jinja2",
    "sentencepiece", "psutil", "gguf", "starlette", "uvicorn", "jax", "jaxlib", "torchax", "ml_dtypes", "peft",
    "datasets", "mlx", "openvino",
}  # fmt: skip

MOST_LINES, MOST_PARAMETERS = 400, 8
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
        ("fluxkiln.verify.ladder", "fluxkiln.compile.process"),
        ("fluxkiln.export.trace", "fluxkiln.cli.main"),
        ("fluxkiln.compile.process", "fluxkiln.compile.toolchains.neuron.make"),
        ("fluxkiln.compile.toolchains.neuron.make", "fluxkiln.compile.toolchains.tpu_mlir.cast"),
        ("fluxkiln.build.make", "fluxkiln.verify.debug"),
        ("fluxkiln.generate.painter", "fluxkiln.verify.debug"),
        ("fluxkiln.settings", "fluxkiln.build.make"),
    ],
)
def test_dependency_rule_refuses(own, target):
    assert not may_import(own, target)


def circles(graph: Mapping[str, Set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node] & graph.keys()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[-len(group) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms that its modules import from."""
    found: dict[str, set[str]] = {}
    for name in MODULES:
        targets = {room_of(target) for target in imports_of(name) if target in MODULES and target != "fluxkiln"}
        found.setdefault(room_of(name), set()).update(targets - {room_of(name)})
    return found


def test_no_modules_import_one_another_in_a_circle():
    assert circles({name: imports_of(name) - {name} for name in MODULES}) == []


def test_no_rooms_import_one_another_in_a_circle():
    assert circles(rooms()) == []


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": {"elsewhere"}}) == []


@cache
def flux_names() -> tuple[set[str], re.Pattern[str]]:
    """What FLUX.1's folder alone may name: kinds of parts, as a whole string; and what nobody else calls so, as a word
    in one: kinds of two words, depths of components, tensors."""
    from fluxkiln.patches.flux1.model import MODEL

    kinds = {*MODEL.kinds, *MODEL.cuts, *(kind.block for kind in MODEL.kinds.values())} - {*MODEL.classes}
    depths = {key for keys in MODEL.whole_numbers.values() for key in keys}
    stacks = {stack for stacks in MODEL.stacks.values() for stack in stacks}
    layout = MODEL.layout("transformer", MODEL.presets["tiny-dev"].configs["transformer"])
    # proj_out is in most of diffusers' transformers
    tensors = {name.partition(".")[0] for name in layout} - {"proj_out"} | {"shared.weight", "relative_attention_bias"}
    long = {kind for kind in kinds if "_" in kind} | depths | stacks | tensors
    return kinds, re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(long, key=len, reverse=True)))})(?!\w)")


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Those of a module but for docstrings."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node


def names_of_the_model(tree: ast.Module) -> list[str]:
    kinds, words = flux_names()
    return [node.value for node in strings(tree) if node.value in kinds or words.search(node.value)]


# words of other fields: jax's for what is done with an index that is out of range
HOMONYMS = {"compile.toolchains.neuron.operators": {"clip"}}


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if not name.startswith("fluxkiln.patches.flux1")])
def test_the_model_is_named_in_its_own_folder_alone(name):
    homonyms = HOMONYMS.get(name.removeprefix("fluxkiln."), set())
    found = [one for one in names_of_the_model(parse(MODULES[name])) if one not in homonyms]
    assert found == [], "this belongs into the model's folder, what is asked of all models into patches/model.py"


@pytest.mark.parametrize(
    "line",
    ['x = "double"', 'f("t5_block")', 'x = {"tail": 1}', 'y = f"{x}.norm_out.linear"', 'c["num_single_layers"]',
     'x = r"single_transformer_blocks\\.\\d+"', 'x = "shared.weight"', 'x = y == "modulated_head"',
     'x = "encoder.block.0"'],
)  # fmt: skip
def test_names_of_the_model_are_seen(line):
    assert len(names_of_the_model(ast.parse(f'"""Of double."""\n{line}\n'))) == 1


def test_what_everybody_says_is_no_name_of_the_model():
    source = '"""t5_block"""\ndef f():\n    "transformer_blocks"\n    return ["a single one", "transformer", "heads"]\n'
    assert names_of_the_model(ast.parse(source)) == []


TOOLCHAINS = sorted(
    path.name for path in (PACKAGE / "compile" / "toolchains").iterdir() if (path / "__init__.py").exists()
)
# also packages: one writes and checks graphs for all of them, and has a rung at which it runs them; for the other there
# are LoRAs as well
PACKAGES = {"onnxruntime", "mlx"}


def toolchains_named(tree: ast.Module) -> list[str]:
    """Strings with a toolchain's name as a word in them; the ending of a file's name is none."""
    words = re.compile(rf"(?<!\w)(?<!^\.)({'|'.join(set(TOOLCHAINS) - PACKAGES)}|toolchains\.\w+)(?!\w)")
    return [node.value for node in strings(tree) if words.search(node.value)]


def is_toolchain(name: str) -> bool:
    return room_of(name).startswith("toolchains.")


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if not is_toolchain(name)])
def test_a_toolchain_is_named_in_its_own_folder_alone(name):
    """But for the target, whose one field says who compiles for it."""
    assert [target for target in imports_of(name) if target in MODULES and is_toolchain(target)] == []
    named = toolchains_named(parse(MODULES[name]))
    if name.startswith("fluxkiln.compile.targets."):
        (target,) = (node for node in ast.walk(parse(MODULES[name])) if isinstance(node, ast.Call)
                     and ast.unparse(node.func) == "Target")  # fmt: skip
        # a target may be called as its toolchain is
        for word in (word for word in target.keywords if word.arg in ("name", "toolchain")):
            if ast.literal_eval(word.value) in named:
                named.remove(ast.literal_eval(word.value))
    assert named == [], "ask the toolchain: see compile/toolchain.py"


def test_names_of_toolchains_are_seen():
    assert TOOLCHAINS == ["gguf", "mlx", "neuron", "onnxruntime", "openvino", "tpu_mlir"]
    source = 'a == "neuron"\nb = {"tpu_mlir": 1}\nimport_module("fluxkiln.compile.toolchains.onnxruntime")\n"neurons"\n'
    assert len(toolchains_named(ast.parse(source))) == 3


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


def crowded(tree: ast.Module) -> Iterator[str]:
    """Functions with too many parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            asked = node.args
            names = {one.arg for one in (*asked.posonlyargs, *asked.args, *asked.kwonlyargs)} - {"self", "cls"}
            if len(names) > MOST_PARAMETERS:
                yield node.name


def test_crowded_functions_are_seen():
    assert list(
        crowded(ast.parse("def f(self, a, b, c, d, e, g, h, *, i): ...\ndef g(a, b, c, d, e, f, h, i, *, j): ..."))
    ) == ["g"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_length_and_names(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: two rooms would be clearer"
    assert not FORBIDDEN_FILES.search(path.stem), "the name says nothing about what is in it"
    if "cli" not in path.parts:
        assert list(crowded(parse(path))) == []
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
    # an extra may be made of another
    others = [re.split(r"[<>=!~ ;\[]", name)[0] for name in wanted if not name.startswith("fluxkiln[")]
    assert [name for name in others if normalised(name) not in pinned] == []


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# what is called alike in every folder of its kind, so that it can be found there
ROLES = {
    "API", "GATES", "GROUP", "METHOD", "PATCHES", "RUNGS", "TARGET", "TOOLCHAIN", "layout_of", "look", "main",
    "open_rungs", "pack", "plan_file", "rounder", "side_tensors", "unpack",
}  # fmt: skip


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_no_two_public_things_have_one_name():
    found: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for name in {name for name in public_names(parse(path)) if not name.startswith("_")} - ROLES:
            found.setdefault(name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}
    assert len(found) > 1000
