"""Files of others, written a few rows at a time: every byte in its place, in whatever order pieces are done."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile import repacked
from fluxkiln.compile.repacked import FileTensor, Placed, RowRange, pack_rows, plan_tensors, write_tensors
from fluxkiln.errors import CheckpointError, SchemeError
from fluxkiln.patches.model import Joined
from fluxkiln.types import TensorRef


def reference(tmp_path: Path, array, name: str) -> TensorRef:
    path = tmp_path / f"{name}.bin"
    path.write_bytes(array.tobytes())
    return TensorRef(name, path, "BF16", array.shape, 0, array.nbytes)


@pytest.mark.parametrize("form", ["Q8_0", "F32", "F16", "BF16"])
def test_rows_go_where_they_belong(tmp_path, monkeypatch, form):
    monkeypatch.setattr(repacked, "BYTES_AT_ONCE", 300)
    random = np.random.default_rng(0)
    one, two = (random.standard_normal((rows, 64)).astype(ml_dtypes.bfloat16) for rows in (7, 6))
    first, second = reference(tmp_path, one, "one"), reference(tmp_path, two, "two")
    rows = (RowRange(first, 0, 7, 0), RowRange(second, 3, 6, 7), RowRange(second, 0, 3, 10))
    tensor, vector = (
        FileTensor("a", (13, 64), form, rows),
        FileTensor("b", (6, 64), "F32", (RowRange(second, 0, 6, 0),)),
    )
    start = 16 + sum(tensor.nbytes) + 5
    seen: list[int] = []
    write_tensors(
        tmp_path / "out", b"head", [Placed(tensor, (16,)), Placed(vector, (start,))], start + sum(vector.nbytes) + 3,
        seen.append,
    )  # fmt: skip
    expected = np.concatenate([one, two[3:], two[:3]])
    whole = b"head".ljust(16, b"\0") + pack_rows(expected, form)[0].tobytes() + bytes(5)
    assert (tmp_path / "out").read_bytes() == whole + two.astype(np.float32).tobytes() + bytes(3)
    assert sum(seen) == one.nbytes + 2 * two.nbytes
    assert len(seen) > 6


def test_a_checkpoint_that_ends_early_is_told(tmp_path):
    ref = reference(tmp_path, np.zeros((8, 64), ml_dtypes.bfloat16), "cut")
    os.truncate(ref.file, 100)
    tensor = FileTensor("a", (8, 64), "Q8_0", (RowRange(ref, 0, 8, 0),))
    with pytest.raises(CheckpointError, match=r"ends inside cut"):
        write_tensors(tmp_path / "out", b"", [Placed(tensor, (0,))], sum(tensor.nbytes), lambda done: None)


def test_what_is_one_tensor_there_is_stored_in_one_way(small_build):
    build = small_build("tiny-dev", "Q8_0,double.attn.to_q=BF16", "gguf")
    names = tuple(f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k", "to_v"))
    with pytest.raises(SchemeError, match=r"to_q\.weight.* are one tensor there, qkv, .* BF16 and Q8_0; name all"):
        plan_tensors(build.checkpoint, build.plan, "transformer", [Joined("qkv", names)], lambda shape: "")
    (alone,) = plan_tensors(build.checkpoint, build.plan, "transformer", [Joined("q", names[:1])], lambda shape: "")
    assert (alone.form, alone.shape) == ("BF16", (256, 256))
