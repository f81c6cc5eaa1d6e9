"""Execution of the protos: per-rank arguments, kept weights, types, and what is said when it fails."""

from __future__ import annotations

import signal

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile.toolchains.neuron.hlo_module import parse_module
from fluxkiln.compile.toolchains.neuron.replicas import Replicas
from fluxkiln.errors import CompileError, ResourceError

pytest.importorskip("jax")


def changed(proto, change):
    module = parse_module(proto)
    change(next(c for c in module.computations if c.id == module.entry_computation_id))
    return module.SerializeToString(deterministic=True)


def collective(main, opcode):
    return next(i for i in main.instructions if i.opcode == opcode)


def test_weights_are_given_once(replicas, lower_block, block_arguments):
    process, arguments = replicas(2), block_arguments(2)
    program = process.load(lower_block(2)[1])
    kept = process.keep([rank[1:] for rank in arguments])
    for scale in (1.0, -2.0):
        x = (arguments[0][0] * scale).astype(np.float32)
        expected = process.run(program, [[x, *rank[1:]] for rank in arguments])
        found = process.run(program, [[x], [x]], kept)
        for one, other in zip(found, expected, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    process.forget(kept)
    with pytest.raises(CompileError, match="KeyError"):
        process.run(program, [[x], [x]], kept)


def test_bfloat16_is_bfloat16(replicas, lower_block, block_arguments):
    process = replicas(2)
    wide = block_arguments(2)
    narrow = [[array.astype(ml_dtypes.bfloat16) for array in rank] for rank in wide]
    found = process.run(process.load(lower_block(2, "bfloat16")[1]), narrow)
    rounded = [[array.astype(np.float32) for array in rank] for rank in narrow]
    expected = process.run(process.load(lower_block(2)[1]), rounded)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == ml_dtypes.bfloat16
            assert 1e-4 < np.linalg.norm(a.astype(np.float32) - b) / np.linalg.norm(b) < 2e-2


def test_swapped_and_split_groups_compute_something_else(replicas, lower_block, block_arguments):
    """Why the check looks at replica groups: XLA runs these without a word."""
    process, arguments, proto = replicas(2), block_arguments(2), lower_block(2)[1]

    def swap(main):
        collective(main, "all-gather").replica_groups[0].replica_ids[:] = [1, 0]

    def split(main):
        groups = collective(main, "all-reduce").replica_groups
        groups[0].replica_ids[:] = [0]
        groups.add(replica_ids=[1])

    expected = process.run(process.load(proto), arguments)
    for change, output in ((swap, 1), (split, 0)):
        found = process.run(process.load(changed(proto, change)), arguments)
        assert np.linalg.norm(found[0][output] - expected[0][output]) > 0.01 * np.linalg.norm(expected[0][output])


def test_wrong_arguments_are_named(replicas, lower_block, block_arguments):
    process, arguments = replicas(2), block_arguments(2)
    program = process.load(lower_block(2)[1])
    with pytest.raises(CompileError, match="arguments for 1 ranks, there are 2"):
        process.run(program, arguments[:1])
    with pytest.raises(CompileError, match="rank 1 has 12 arguments, the module takes 13"):
        process.run(program, [arguments[0], arguments[1][:-1]])
    with pytest.raises(CompileError, match=r"rank 0, parameter p0: an array float64 \[1, 6, 32\] is given.*float32"):
        process.run(program, [[arguments[0][0].astype(np.float64), *arguments[0][1:]], arguments[1]])
    with pytest.raises(CompileError, match=r"parameter p0: an array float32 \[16\] is given.*float32 \[1, 6, 32\]"):
        process.run(program, [arguments[0][::-1], arguments[1]])
    with pytest.raises(CompileError, match=r"executing on 2 virtual devices \(load\) failed"):
        process.load(b"no module")
    assert process.run(program, arguments)


def test_one_call_runs_once_and_leaves_nothing(lower_block, block_arguments, tmp_path):
    with Replicas(2) as process:
        found = process.run(process.load(lower_block(2)[1]), block_arguments(2))
    assert [[array.shape for array in rank] for rank in found] == [[(1, 6, 32), (1, 6, 32)]] * 2
    with Replicas(1, tmp_path / "logs" / "xla.log") as process:
        scratch, worker = process._scratch.name, process._process
        assert (tmp_path / "logs" / "xla.log").is_file()
    assert worker.poll() is not None
    assert not tmp_path.joinpath(scratch).exists()


@pytest.mark.parametrize(
    ("sent", "error", "message"),
    [
        (signal.SIGKILL, ResourceError, r"the process was killed \(signal 9\).*memory runs out"),
        (signal.SIGSEGV, CompileError, r"XLA ended with code -11: it printed nothing; check the module"),
    ],
)
def test_a_process_that_died_is_named(lower_block, sent, error, message):
    with Replicas(1) as process:
        process._process.send_signal(sent)
        process._process.wait()
        with pytest.raises(error, match=message):
            process.load(lower_block(1)[1])
