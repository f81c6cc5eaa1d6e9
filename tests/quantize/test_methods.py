"""Methods as files: found by name, light until they compute, and no other module knows one by its name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fluxkiln
from fluxkiln.errors import SchemeError
from fluxkiln.quantize import methods
from fluxkiln.quantize.methods import Method, find_method, method_names
from fluxkiln.quantize.rounders import make_rounder
from fluxkiln.quantize.schemes import parse_scheme
from tests.quantize.weights import make_weight, pack_matrix

PACKAGE = Path(fluxkiln.__file__).parent


@pytest.mark.parametrize("name", method_names())
def test_every_file_is_a_method(name):
    method = find_method(name)
    assert isinstance(method, Method)
    assert bool(method.roles) == (method.side_tensors is not None)
    assert bool(method.default_rank) <= bool(method.roles)
    scheme = parse_scheme(f"W4BF16-{name}")
    assert (scheme.how, scheme.rank, scheme.codes_only) == (method, method.default_rank, not method.roles)
    assert (scheme.compiled_name == "W4BF16") == scheme.codes_only


def test_one_method_is_the_compilers():
    assert [name for name in method_names() if find_method(name).as_compiler] == ["rtn"]


def test_an_unknown_method_is_refused_with_the_others():
    with pytest.raises(SchemeError, match="no method is called 'best'; there are awq, gptq, ls, mse, rtn, rtn0, svd"):
        find_method("best")


def test_a_new_file_is_a_new_method(tmp_path, monkeypatch):
    (tmp_path / "half.py").write_text(
        "from fluxkiln.quantize.methods import Method\n"
        "def rounder(statistics, symmetric):\n"
        "    def pack(weight, bits, codes, scales, zeros):\n"
        "        codes[:], scales[:], zeros[:] = 0x88, 0x3F80, 7\n"
        "    return pack\n"
        "METHOD = Method(rounder)\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    method_names.cache_clear()
    try:
        scheme = parse_scheme("W4BF16-half")
        assert (scheme.name, scheme.compiled_name) == ("W4BF16-half", "W4BF16")
        packed = pack_matrix(make_weight("gaussian", (2, 64)), scheme)
        assert (packed.codes_OI == 0x88).all()
        assert callable(make_rounder(scheme))
    finally:
        monkeypatch.undo()
        method_names.cache_clear()
        find_method.cache_clear()
        sys.modules.pop("fluxkiln.quantize.methods.half", None)


def test_schemes_are_named_without_what_methods_compute_with():
    code = (
        "import sys\nfrom fluxkiln.quantize.methods import method_names\n"
        "from fluxkiln.quantize.schemes import parse_scheme\n"
        "for name in method_names(): parse_scheme(f'W4BF16-{name}')\n"
        "print([name for name in ('numpy', 'numba', 'ml_dtypes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, text=True, stdout=subprocess.PIPE)
    assert done.stdout.strip() == "[]"


def names_compared(tree):
    """Names of methods that something is compared with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for one in ast.walk(node):
                if isinstance(one, ast.Constant) and one.value in method_names():
                    yield node.lineno, one.value


def test_nothing_asks_for_a_method_by_its_name():
    wrong = [
        (str(path.relative_to(PACKAGE)), *found)
        for path in PACKAGE.rglob("*.py")
        for found in names_compared(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert wrong == []
    # the control
    assert list(names_compared(ast.parse("scheme.method == 'awq'\nm in ('ls', 'x')"))) == [(1, "awq"), (2, "ls")]
