from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fluxkiln.artifacts import code
from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import GROUND, PACKAGE, code_version, digest_sources, package_version, reached_sources
from fluxkiln.artifacts.store import open_store
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import probe_weight
from fluxkiln.errors import FluxkilnError
from fluxkiln.export.finite import first_nonfinite

ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
STAGE = "from fluxkiln.artifacts.actions import Action, run_action\n"
UNREACHED = b"\n\ndef _never_called() -> None: ...\n"


@dataclass(frozen=True)
class Stage:
    """The functions of a `code_version` of the package, as module and name, and classes of what they are handed."""

    starts: tuple[tuple[str, str], ...]
    classes: tuple[tuple[str, str, str], ...]
    spelt: str


MODEL = (("model", "fluxkiln.patches.flux1.model", "Flux1"),)


def stages() -> dict[str, Stage]:
    found = {}
    for path in MODULES:
        text = path.read_text()
        if "import code_version" not in text:
            continue
        imported = code._top_level(text)[1]
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "code_version":
                assert {word.arg for word in node.keywords} <= {"model"}
                classes, spelt = MODEL if node.keywords else (), ast.unparse(node)
                if [ast.unparse(argument) for argument in node.args] == ["self.write"]:
                    found |= {" ".join(start): Stage((start,), classes, spelt) for start in members("write")}
                    continue
                names = [argument.id for argument in node.args if isinstance(argument, ast.Name)]
                assert len(names) == len(node.args), f"{path}: name functions"
                starts = tuple(imported.get(name, [(module, name)])[0] for name in names)
                found[" ".join(names)] = Stage(starts, classes, spelt)
    return found


def members(attribute: str) -> list[tuple[str, str]]:
    """The functions that classes of the package have as this attribute: `attribute = staticmethod(function)`."""
    found = []
    for path in MODULES:
        text, module = path.read_text(), ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in re.findall(rf"^    {attribute} = staticmethod\((\w+)\)$", text, re.MULTILINE):
            found.append(code._top_level(text)[1].get(name, [(module, name)])[0])
    return found


STAGES = stages()


def reached(name: str, changed: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """The sources of a stage, with some files of the package as they are in `changed`."""
    changed = changed or {}

    def read(path: Path) -> bytes:
        return changed.get(path.relative_to(ROOT).as_posix()) or path.read_bytes()

    return reached_sources(STAGES[name].starts, STAGES[name].classes, read=read)


def touched(path: str, source: bytes) -> bytes:
    """The file at `path` with a comment more, in what is reached of it: `source`."""
    whole = (ROOT / path).read_bytes()
    if whole == source:
        return whole + b"\n# touched\n"
    line = source.splitlines(keepends=True)[0]
    assert line in whole
    return whole.replace(line, line.rstrip() + b"  # touched\n", 1)


def test_all_stages_are_found():
    assert set(STAGES) == {
        "make_template",
        "make_mould",
        "compile_part",
        "combine_shells",
        "cast_file",
        "fluxkiln.compile.toolchains.gguf.toolchain write_files",
        "fluxkiln.compile.toolchains.mlx.file write_components",
        "integer_template",
        "_fill_part",
        "prove_mould",
        "_read_through",
        "record_run",
        "reference_runs",
        "_lower",
        "shard_weights _shard_part",
        "_record",
        "measure_errors",
        "part_rounders _stored_beside find_method",
    }


def test_no_action_has_a_version_by_hand():
    spelt: set[str] = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Action":
                given = [word.value for word in node.keywords if word.arg == "code_version"] + node.args[2:3]
                spelt.update(ast.unparse(one) for one in given)
    by_function = {stage.spelt for stage in STAGES.values()}
    # the version of a build is the package's; two are handed on; a module's own compile and a pointer have no code
    assert spelt - by_function == {"package_version()", "version", "str(settings['code'])", "_RECIPE", "'1'"}


@pytest.mark.parametrize("name", STAGES)
def test_touching_any_source_of_a_stage_changes_its_key(name):
    sources = reached(name)
    before = digest_sources(sources)
    assert before == digest_sources(reached(name))
    same = [path for path in sources if digest_sources(reached(name, {path: touched(path, sources[path])})) == before]
    assert same == []


@pytest.mark.parametrize("name", STAGES)
def test_touching_any_source_outside_a_stage_does_not_change_its_key(name):
    sources = reached(name)
    whole = {path for path, source in sources.items() if (ROOT / path).read_bytes() == source}
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() + UNREACHED for path in MODULES}
    outside = {path: source for path, source in files.items() if path not in whole}
    assert len(outside) > 100
    assert reached(name, outside) == sources


def test_every_stage_leaves_the_ground_out():
    files = [f"{name.removesuffix('.*').replace('.', '/')}" for name in GROUND.keys() - {"fluxkiln"}]
    for name, stage in STAGES.items():
        started = {module.replace(".", "/") for module, _ in stage.starts}
        others = tuple(f"{file}{end}" for file in files if file not in started for end in (".py", "/"))
        assert [path for path in reached(name) if path.startswith(others)] == []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("_record", "patches/flux1/published.py"),
        ("_read_through", "export/finite.py"),
        ("part_rounders _stored_beside find_method", "quantize/pack.py"),
        ("part_rounders _stored_beside find_method", "quantize/side_tensors.py"),
        ("part_rounders _stored_beside find_method", "quantize/methods/gptq.py"),
        ("make_mould", "compile/toolchains/tpu_mlir/transform.py"),
        ("make_mould", "compile/toolchains/tpu_mlir/deploy.py"),
        ("make_mould", "compile/toolchains/tpu_mlir/stubs/plotly/subplots.py"),
        ("make_template", "patches/flux1/patches.py"),
        ("shard_weights _shard_part", "patches/flux1/parallel.py"),
    ],
)
def test_what_lists_by_hand_left_out_or_runs_elsewhere_counts(name, path):
    assert f"{PACKAGE.name}/{path}" in reached(name)


def test_a_mould_does_not_depend_on_methods_of_rounding_or_on_the_exporter():
    sources = reached("make_mould")
    assert [path for path in sources if path.startswith(("fluxkiln/quantize/methods/", "fluxkiln/export/trace"))] == []
    of_model = {path.removeprefix("fluxkiln/patches/flux1/") for path in sources if "/flux1/" in path}
    assert of_model == {"model.py", "kinds.py"}


def test_a_mould_depends_on_nothing_of_its_model_but_its_kinds():
    path = "fluxkiln/patches/flux1/model.py"
    whole = (ROOT / path).read_bytes()
    changed = whole.replace(b'return "dev" if guided', b'return "schnell" if guided').replace(b"28", b"29")
    assert changed != whole
    assert reached("make_mould", {path: changed}) == reached("make_mould")
    other = whole.replace(b"kinds.ALL_KINDS", b"kinds.KINDS")
    assert other != whole
    assert reached("make_mould", {path: other}) != reached("make_mould")


def test_a_stage_is_handed_the_model_whose_members_it_uses():
    for name, stage in STAGES.items():
        walk = code._Walk(frozenset(stage.starts), frozenset(), {PACKAGE.name: ROOT}, Path.read_bytes)
        walk.open_class(*MODEL[0])
        members = {member for _, member in walk.members}
        methods = {member for (_, member), found in walk.members.items() if "def " in found[0][1]}
        pending, seen = list(stage.starts), set()
        while pending:
            target = pending.pop()
            if target not in seen:
                seen.add(target)
                pending += walk.enter(*target)
        used = [member for owner, member in walk.used if owner == "model" and member in members]
        # what the model says of a kind shows in the mould, which is an input of its proof
        assert bool(used) == bool(stage.classes) or name == "prove_mould", name
        # by another name they would not be found; these are names of other things as well
        elsewhere = {member for owner, member in walk.used if owner not in ("model", "self") and member in methods}
        assert elsewhere <= {"encode", "decode", "layout", "patches"}, name


def test_no_stage_depends_on_the_command_line_or_on_reports():
    for name in STAGES:
        assert [path for path in reached(name) if path.startswith(("fluxkiln/cli/", "fluxkiln/verify/report"))] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_sources_are_read_as_the_parser_reads_them(path):
    text = path.read_text()
    defined, imported = code._top_level(text)
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert all(target in imported[name] for name, target in bindings([node]))
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            assert "".join(lines[node.lineno - 1 : node.end_lineno]) not in str(defined)
            continue
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
        source = "".join(lines[first - 1 : node.end_lineno])
        for name in defines(node):
            (statement,) = (one for one in defined.get(name, ()) if one.startswith(source.rstrip()))
            found = code._uses(statement)
            ran = list(running(node))
            assert {one.id for one in ran if isinstance(one, ast.Name)} <= found.names
            assert {target for _, target in bindings(ran)} == found.imports


def defines(node: ast.stmt) -> Iterable[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = list(itertools.chain.from_iterable(getattr(target, "elts", [target]) for target in targets))
    return [one.id if isinstance(one, ast.Name) else "" for one in names] or [""]


def running(node: ast.AST) -> Iterable[ast.AST]:
    """All nodes but those for type checkers."""
    yield node
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    for child in node.orelse if for_types else ast.iter_child_nodes(node):
        yield from running(child)


def bindings(nodes: Iterable[ast.AST]) -> set[tuple[str, tuple[str, str | None]]]:
    """Each name that is imported, the module it is from and its name there."""
    found: set[tuple[str, tuple[str, str | None]]] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {(one.asname or one.name.partition(".")[0], (one.name, None)) for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {(one.asname or one.name, (base, one.name)) for one in node.names}
    return found


@pytest.fixture
def tree(tmp_path: Path):
    """Writes a package; returns what `fluxkiln.stage.make` of it reaches, the stage's own module aside."""

    def write(stage: str, **files: str) -> set[str]:
        for name, text in {"stage.py": STAGE + stage, "other.py": "", **files}.items():
            path = tmp_path / "fluxkiln" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        found = reached_sources([("fluxkiln.stage", "make")], root=tmp_path)
        return {path.removeprefix("fluxkiln/") for path in found} - {"stage.py"}

    return write


@pytest.mark.parametrize(
    "stage",
    [
        "from fluxkiln.other import f\ndef make():\n    return f()\n",
        "from fluxkiln import other\ndef make():\n    return other.f()\n",
        "from fluxkiln import other as o\ndef make():\n    return o.f()\n",
        "import fluxkiln.other\ndef make():\n    return fluxkiln.other.f()\n",
        "from .other import f as g\ndef make():\n    return g()\n",
        "from fluxkiln.other import (\n    a,  # why\n    f,\n)\ndef make():\n    return f()\n",
        "def make():\n    from fluxkiln.other import f\n    return f()\n",
        "def make():\n    with x:\n        from fluxkiln import other\n",
        "from fluxkiln.other import f\ndef make():\n    def inner():\n        return lambda: f\n",
        "from fluxkiln.other import f\ndef make():\n    return _helper()\ndef _helper():\n    return f()\n",
        "from fluxkiln.other import f\nTABLE = {'f': f}\ndef make():\n    return TABLE\n",
        "from fluxkiln.other import f\nA, B = f(), 1\ndef make():\n    return B\n",
        "from fluxkiln.other import f\nclass Kind:\n    def call(self):\n        f()\ndef make():\n    return Kind()\n",
        "from fluxkiln.other import f\n@f(\n    1\n)\ndef make():\n    return 1\n",
        "from fluxkiln.other import f\ndef make(kind: f):\n    return 1\n",
        "from fluxkiln.other import f\ndef make():\n    return f'{f()}'\n",
        "from fluxkiln.other import f\nX = {}\nX['f'] = f\ndef make():\n    return 1\n",
        "try:\n    from fluxkiln.other import f\nexcept ImportError:\n    f = None\ndef make():\n    return f\n",
        "from fluxkiln.between import f\ndef make():\n    return f()\n",
        "def make():\n    return run('fluxkiln.other')\n",
        'def make():\n    return run(Path(__file__).with_name("other.py"))\n',
        'WORKER = Path(__file__).parent / "other.py"\ndef make():\n    return run(WORKER)\n',
        'def make(name):\n    return import_module(f"fluxkiln.{name}")\n',
    ],
)
def test_a_module_that_is_used_counts(tree, stage):
    assert "other.py" in tree(stage, **{"__init__.py": "", "between.py": "from fluxkiln.other import f\n"})


@pytest.mark.parametrize(
    "stage",
    [
        "from fluxkiln.other import f\ndef make():\n    return 1\n",
        "from fluxkiln.other import f\ndef make():\n    return 1\ndef unrelated():\n    return f()\n",
        "if TYPE_CHECKING:\n    from fluxkiln.other import f\ndef make(one: f):\n    return f\n",
        "def make():\n    if TYPE_CHECKING:\n        from fluxkiln.other import f\n    return f\n",
        "from fluxkiln.other import f\ndef make():\n    return box.f\n",
        "from fluxkiln.other import f\ndef make():\n    return box(f=1)\n",
        'from fluxkiln.other import f\ndef make():\n    """Not f."""\n    return "f"  # f\n',
        "def make():\n    '''\nfrom fluxkiln.other import f\n'''\n",
        "from fluxkiln.other import f\ndef make():\n    return step()\ndef step():\n    return run_action(cache, f)\n",
        "from fluxkiln.other import f\ndef make():\n    return key()\ndef key():\n    return Action('', f)\n",
        "from fluxkiln.other import f\ndef make():\n    return key()\ndef key() -> Action:\n    return f()\n",
        'def make():\n    return run(folder / "other.py")\n',
    ],
)
def test_a_module_that_is_not_used_does_not_count(tree, stage):
    assert tree(stage) == set()


def test_beyond_the_stage_modules_definitions_lead_on_and_sources_count_whole(tree):
    files = {
        "one.py": "from fluxkiln.two import a\nfrom fluxkiln.other import b\nf = lambda: a\ng = lambda: b\n",
        "two.py": "a = 1\n",
    }
    assert tree("from fluxkiln.one import f\ndef make():\n    return f()\n", **files) == {"one.py", "two.py"}
    assert tree("from fluxkiln.one import g\ndef make():\n    return g()\n", **files) == {"one.py", "other.py"}
    assert tree("from fluxkiln import one\ndef make():\n    return one.f\n", **files) == {
        "one.py",
        "two.py",
        "other.py",
    }


def test_other_stage_modules_count_by_definition(tree, tmp_path):
    stage = "from fluxkiln.steps import f\ndef make():\n    return f()\n"
    steps = STAGE + "from fluxkiln.other import b\nX = 1\ndef f():\n    return X\ndef g():\n    return b\n"
    assert tree(stage, **{"steps.py": steps}) == {"steps.py"}
    before = reached_sources([("fluxkiln.stage", "make")], root=tmp_path)
    tree(stage, **{"steps.py": steps.replace("return b", "return 2 * b")})
    assert reached_sources([("fluxkiln.stage", "make")], root=tmp_path) == before
    tree(stage, **{"steps.py": steps.replace("X = 1", "X = 2")})
    assert reached_sources([("fluxkiln.stage", "make")], root=tmp_path) != before


def test_folders_and_data_beside_a_module_count(tree):
    files = {"data/list.txt": "a", "data/deep/more.toml": "b", "data/__pycache__/x.pyc": "c", "alone.txt": "d"}
    stage = 'DATA = Path(__file__).parent / "data"\ndef make():\n    return DATA\n'
    assert tree(stage, **files) == {"data/list.txt", "data/deep/more.toml"}


def test_a_worker_leads_on(tree):
    files = {"worker.py": "from fluxkiln.other import f\nprint(f())\n"}
    assert tree('def make():\n    return run(Path(__file__).with_name("worker.py"))\n', **files) == {
        "worker.py",
        "other.py",
    }


def test_a_package_found_by_name_counts_with_all_its_modules(tree):
    files = {
        "methods/__init__.py": 'def find(name):\n    return import_module(f"{__name__}.{name}")\n',
        "methods/a.py": "from fluxkiln.other import f\nf()\n",
        "methods/b/__init__.py": "",
        "methods/notes.txt": "",
    }
    found = tree("from fluxkiln.methods import find\ndef make():\n    return find('a')\n", **files)
    assert found == {"methods/__init__.py", "methods/a.py", "methods/b/__init__.py", "other.py"}


def test_the_version_of_a_plug_in(tmp_path, monkeypatch):
    folder = tmp_path / "toy_target"
    folder.mkdir()
    (folder / "__init__.py").write_text("from toy_target.work import step\ndef make():\n    return step()\n")
    (folder / "work.py").write_text(
        "from fluxkiln.export.finite import first_nonfinite\ndef step(): return first_nonfinite\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import toy_target

    sources = reached_sources([("toy_target", "make")])
    assert set(sources) == {"toy_target/__init__.py", "toy_target/work.py", "fluxkiln/export/finite.py"}
    assert code_version(toy_target.make) == digest_sources(sources)


def test_members_of_an_object_count_where_they_are_used(tree, tmp_path):
    kind = (
        "from fluxkiln.other import f\nfrom fluxkiln.basis import Basis\n"
        "class Kind(Basis):\n    table = f\n\n    def draw(self):\n        return self.tell()\n\n"
        "    def rest(self):\n        return f()\n"
    )
    basis = "class Basis:\n    def tell(self):\n        from fluxkiln.told import t\n"
    files = {
        "kind.py": kind,
        "basis.py": basis,
        "told.py": "t = 1\n",
        "work.py": "def draw(model):\n    model.draw()\n",
    }
    classes = [
        ("model", "fluxkiln.kind", "Kind"),
        ("model", "fluxkiln.basis", "Basis"),
        ("model", "builtins", "object"),
    ]

    def found(stage: str) -> set[str]:
        tree(stage, **files)
        return {Path(path).name for path in reached_sources([("fluxkiln.stage", "make")], classes, tmp_path)}

    always = {"stage.py", "kind.py", "basis.py"}
    assert found("def make(model):\n    return 1\n") == always
    assert found("def make(model):\n    return model.draw()\n") == always | {"told.py"}
    assert found("from fluxkiln.work import draw\ndef make(one):\n    draw(one)\n") == always | {"told.py", "work.py"}
    assert found("def make(kiln):\n    return kiln.checkpoint.model.rest()\n") == always | {"other.py"}
    assert found("def make(model):\n    return model.table\n") == always | {"other.py"}
    assert found("def make(model, other):\n    return other.rest(), 'model.rest()'\n") == always


def test_versions_of_functions():
    assert code_version(first_nonfinite) == digest_sources(
        reached_sources([("fluxkiln.export.finite", "first_nonfinite")])
    )
    assert code_version(first_nonfinite) != code_version(probe_weight) != code_version(first_nonfinite, probe_weight)
    for function in (lambda: 1, Action.ingredients, test_versions_of_functions.__class__):
        with pytest.raises(FluxkilnError, match="no version"):
            code_version(function)


def test_the_version_does_not_depend_on_where_the_package_lies(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, stage in STAGES.items():
        assert reached_sources(stage.starts, stage.classes, tmp_path) == reached(name)
    assert package_version(tmp_path / PACKAGE.name) == package_version()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "patches"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "rope.py").write_text("a = 1\n")
    (folder / "schemes.toml").write_text("x = 1\n")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "rope.py").write_text("a = 2\n"),
        lambda folder: (folder / "schemes.toml").write_text("x = 2\n"),
        lambda folder: (folder / "new.py").write_text(""),
        lambda folder: (folder / "rope.py").rename(folder / "rope2.py"),
        lambda folder: (folder / "schemes.toml").unlink(),
    ],
)
def test_a_changed_package_makes_its_builds_stale(tmp_path, package, change):
    cache = ActionCache(open_store(tmp_path / "store"))

    def action():
        return Action("build", "double", package_version.__wrapped__(package), {})

    before = action()
    run_action(cache, before, lambda _: ({}, {}))
    assert run_action(cache, action(), lambda _: pytest.fail("it ran again")).hit
    change(package)
    assert action().key != before.key
    assert run_action(cache, action(), lambda _: ({}, {})).hit is False


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: os.utime(folder / "rope.py", (1, 1)),
        lambda folder: (folder / "__pycache__" / "rope.cpython-311.pyc").write_bytes(b"x"),
        lambda folder: (folder / ".rope.py.swp").write_bytes(b"x"),
        lambda folder: (folder / "rope.py~").write_bytes(b"x"),
    ],
)
def test_what_is_no_source_does_not_change_the_package_version(package, change):
    before = package_version.__wrapped__(package)
    change(package)
    assert package_version.__wrapped__(package) == before
