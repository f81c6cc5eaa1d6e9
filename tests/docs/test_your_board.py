"""The program of docs/your-board.md, against a double of sophon-sail's documented interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.compile.boards import sail
from tests.docs.pages import ROOT, code_blocks

PAGE = ROOT / "docs" / "your-board.md"
SHAPES = {"hidden_states": ([2, 3], "bfloat16"), "input_ids": ([1, 4], "int32"), "times": ([5], "float32")}


def spec(name, called=None):
    shape, dtype = SHAPES[name]
    return {"name": called or name, "shape": shape, "dtype": dtype}


def test_values_pass_as_their_bits(monkeypatch):
    seen = []

    def work(times, hidden, ids):
        seen.extend((times.dtype, hidden.dtype, ids.dtype))
        return hidden, times * 2

    graphs = {"a.bmodel": {"block_00": (["times", "hidden_states", "input_ids"], ["12_f", "13_f"], work)}}
    module = sail(graphs)
    monkeypatch.setitem(sys.modules, "sophon", SimpleNamespace(sail=module))
    part = {
        "file": "a.bmodel", "net": "block_00", "inputs": [spec(name) for name in SHAPES],
        "outputs": [spec("hidden_states", "hidden_states_out"), spec("times", "out")],
    }  # fmt: skip
    names = {"np": np, "folder": Path("somewhere"), "parts": {"block.00": part}}
    (program,) = code_blocks(PAGE, "python")
    exec(program, names)
    hidden = np.array([[1, -2.5, 3.1415926], [1e-3, 0, 1 + 2**-8]], np.float32)
    made = names["run"]("block.00", hidden_states=hidden, input_ids=[[1, 2, 3, 4]], times=np.arange(5), more=1)
    assert seen == [np.float32, np.uint16, np.int32]
    np.testing.assert_allclose(made[0], hidden, rtol=2**-8)
    assert made[0][1, 2] == 1, "rounded to nearest, ties to even"
    np.testing.assert_array_equal(made[1], 2 * np.arange(5))
    assert module.loaded == ["a.bmodel"]
