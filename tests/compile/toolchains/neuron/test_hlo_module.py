"""The canonical form: one for equal modules, in any process; what is computed stays."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise, entry_parameters, listed_groups, parse_module
from fluxkiln.errors import CompileError

pytest.importorskip("jax")

ROOT = Path(__file__).resolve().parents[4]
ELSEWHERE = """
import sys, torch
from fluxkiln.types import TensorSpec
from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise
from fluxkiln.compile.toolchains.neuron.frontend import lower_module

class Another(torch.nn.Module):
    def __init__(self, collectives):
        super().__init__()
        self.first, self.other = (torch.nn.Linear(8, 8, device="meta") for _ in range(2))
        self.collectives = collectives
    def forward(self, hidden):
        return self.collectives.all_reduce(self.first(hidden)) + self.other(hidden)

warm = lower_module(Another, [TensorSpec("x", (5, 8))], 4, "float32")  # so that counters of the process differ
proto = lower_module(Another, [TensorSpec("x", (3, 8))], 2, "bfloat16").proto
sys.stdout.buffer.write(canonicalise(proto))
"""


def changed(proto, change):
    module = parse_module(proto)
    change(module)
    return module.SerializeToString(deterministic=True)


def main_of(module):
    return next(c for c in module.computations if c.id == module.entry_computation_id)


def test_equal_modules_of_two_processes_give_equal_bytes():
    import torch

    from fluxkiln.compile.toolchains.neuron.frontend import lower_module
    from fluxkiln.types import TensorSpec

    class Linears(torch.nn.Module):
        def __init__(self, collectives):
            super().__init__()
            self.one, self.two = (torch.nn.Linear(8, 8, device="meta") for _ in range(2))
            self.collectives = collectives

        def forward(self, x):
            summed = self.collectives.all_reduce(self.one(x))
            return summed + self.two(x)

    def lower(rows):
        return lower_module(Linears, [TensorSpec("y", (rows, 8))], 2, "bfloat16").proto

    here = lower(3)
    there = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=ROOT, capture_output=True, check=True).stdout
    assert hashlib.sha256(canonicalise(here)).digest() == hashlib.sha256(there).digest()
    assert canonicalise(lower(3)) == there
    assert canonicalise(lower(4)) != there


def test_twice_is_once(lower_block):
    for ranks in (1, 2):
        proto = lower_block(ranks)[1]
        assert canonicalise(proto) == proto


def test_numbers_names_and_sources(lower_block):
    raw, proto = lower_block(2)[0].proto, lower_block(2)[1]
    assert b"site-packages" in raw
    assert max(i.id for c in parse_module(raw).computations for i in c.instructions) > 2**31
    for trace in (b"site-packages", b"fluxkiln", b"forward", b".py", b"jit", b"psum", b"arrays"):
        assert trace not in proto
    module = parse_module(proto)
    numbers = [i.id for c in module.computations for i in c.instructions]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [c.id for c in module.computations] == list(range(1, len(module.computations) + 1))
    assert all(i.name == f"{i.opcode}.{i.id}" for c in module.computations for i in c.instructions)
    assert (module.name, module.entry_computation_name, main_of(module).name) == ("module", "main", "main")


def test_what_is_computed_stays(replicas, lower_block, block_arguments):
    process, arguments = replicas(2), block_arguments(2)
    raw, canonical = (
        process.run(process.load(proto), arguments) for proto in (lower_block(2)[0].proto, lower_block(2)[1])
    )
    for rank in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(raw[rank], canonical[rank], strict=True))


def test_replica_groups_are_moved_to_the_classic_field(lower_block):
    raw, canonical = (main_of(parse_module(proto)) for proto in (lower_block(4)[0].proto, lower_block(4)[1]))
    for computation, newer in ((raw, True), (canonical, False)):
        found = [i for i in computation.instructions if i.opcode.startswith("all-")]
        assert len(found) == 3
        assert all(i.HasField("collective_device_list") == newer for i in found)
        assert all(bool(i.replica_groups) != newer for i in found)
        assert all(listed_groups(i) == ((0, 1, 2, 3),) for i in found)


def test_iota_form_of_replica_groups(lower_block):
    def to_iota(module):
        for instruction in main_of(module).instructions:
            if instruction.HasField("collective_device_list"):
                instruction.collective_device_list.ClearField("replica_groups")
                iota = instruction.collective_device_list.iota
                iota.groups, iota.group_size = 1, 4
                iota.reshape_dimensions.append(4)

    raw, proto = lower_block(4)[0].proto, lower_block(4)[1]
    assert canonicalise(changed(raw, to_iota)) == proto

    def transposed(module):
        to_iota(module)
        reduce = next(i for i in main_of(module).instructions if i.opcode == "all-reduce")
        reduce.collective_device_list.iota.permutation.extend([1, 0])

    with pytest.raises(CompileError, match=r"psum.* transposed form \[4\] \[1, 0\]"):
        canonicalise(changed(raw, transposed))


def test_contradicting_groups_are_refused(lower_block):
    def contradict(module):
        reduce = next(i for i in main_of(module).instructions if i.opcode == "all-reduce")
        reduce.replica_groups.add(replica_ids=[0])

    with pytest.raises(CompileError, match=r"replica groups \(\(0,\),\) in one field and \(\(0, 1\),\) in another"):
        canonicalise(changed(lower_block(2)[0].proto, contradict))


def point_to_nothing(module):
    main_of(module).instructions[-1].operand_ids[0] = 12345


def swap_order(module):
    dot = next(i for i in main_of(module).instructions if i.opcode == "dot")
    dot.operand_ids[0] = main_of(module).instructions[-1].id


def lose_root(module):
    main_of(module).root_id = 99999


def lose_entry(module):
    module.entry_computation_id = 77


def donate(module):
    module.buffer_donor = b"\x0a\x02\x08\x01"


def be_newer(module):
    main_of(module).instructions[3].newer_98 = b"\x08\x01"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (point_to_nothing, r"operand of instruction \d+ \(tuple\): there is no id 12345 before it"),
        (swap_order, r"operand of instruction \d+ \(dot\): there is no id \d+ before it"),
        (lose_root, "root of computation .* 99999"),
        (lose_entry, "entry computation: there is no id 77"),
        (donate, r"gives its inputs away \(buffer_donor\)"),
        (be_newer, r"newer_98 b'\\x08\\x01'"),
    ],
)
def test_damage_is_named(lower_block, change, message):
    with pytest.raises(CompileError, match=message):
        canonicalise(changed(lower_block(2)[0].proto, change))


def test_bytes_that_are_no_module(lower_block):
    proto = lower_block(2)[1]
    for damaged in (proto[: len(proto) // 2], b"\xff" * 40):
        with pytest.raises(CompileError, match="bytes that are no HLO module proto"):
            canonicalise(damaged)
    with pytest.raises(CompileError, match="0 computations"):
        canonicalise(b"")


def test_fields_that_are_not_described_are_refused(lower_block):
    unknown = b"\xba\x06\x03abc"  # field 103, three bytes
    with pytest.raises(CompileError, match="has 6 bytes in fields that are not known here"):
        canonicalise(lower_block(2)[1] + unknown)


def test_parameters_of_a_module(lower_block):
    lowered, proto = lower_block(2, "bfloat16")
    found = [(spec.shape, spec.dtype) for spec in entry_parameters(proto)]
    assert found == [(spec.shape, spec.dtype) for spec in lowered.parameters]
