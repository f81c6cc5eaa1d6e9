"""The check: what a module costs, and each way in which it must not be."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.compile.toolchains.neuron.check import check_hlo
from fluxkiln.compile.toolchains.neuron.frontend import lower_module
from fluxkiln.compile.toolchains.neuron.hlo_module import canonicalise, parse_module
from fluxkiln.errors import CompileError
from fluxkiln.types import TensorSpec

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

TWO = {"all_reduces": 2, "all_gathers": 1, "ranks": 2}
NONE = {"all_reduces": 0, "all_gathers": 0, "ranks": 1}


def changed(proto, change):
    module = parse_module(proto)
    change(module, next(c for c in module.computations if c.id == module.entry_computation_id))
    return module.SerializeToString(deterministic=True)


def first(computation, opcode):
    return next(i for i in computation.instructions if i.opcode == opcode)


def lower(forward, *shapes):
    class Made(torch.nn.Module):
        def forward(self, *arguments):
            return forward(*arguments)

    inputs = [TensorSpec(f"x{index}", shape) for index, shape in enumerate(shapes)]
    return canonicalise(lower_module(lambda collectives: Made(), inputs, 1, "float32").proto)


def test_facts_of_a_block(lower_block):
    lowered, proto = lower_block(2)
    facts = check_hlo(proto, **TWO)
    assert (facts.operations["all-reduce"], facts.operations["all-gather"]) == (2, 1)
    assert facts.all_reduce_bytes == (6 * 32 * 4,) * 2
    assert facts.all_gather_bytes == (2 * 6 * 16 * 4,)
    assert facts.parameter_bytes == sum(4 * int(np.prod(spec.shape)) for spec in lowered.parameters)
    # q, k, v, out, up, down and gate of half the heads and features; scores and values of two heads of 8
    linears = 32 * 48 + 16 * 32 + 32 * 32 + 32 * 32 + 32 * 16
    assert facts.flops == 2 * 6 * linears + 2 * (2 * 2 * 6 * 6 * 8)
    narrow = check_hlo(lower_block(2, "bfloat16")[1], **TWO)
    assert narrow.flops == facts.flops
    assert narrow.parameter_bytes * 2 == facts.parameter_bytes
    assert narrow.all_reduce_bytes == (6 * 32 * 2,) * 2


def test_operations_of_a_convolution():
    proto = lower(lambda x, kernel: torch.nn.functional.conv2d(x, kernel, groups=2), (1, 4, 8, 8), (6, 2, 3, 3))
    assert check_hlo(proto, **NONE).flops == 2 * (6 * 6 * 6) * (2 * 3 * 3)


def swap_groups(module, main):
    groups = first(main, "all-reduce").replica_groups
    groups[0].replica_ids[:] = [1, 0]


def split_groups(module, main):
    groups = first(main, "all-gather").replica_groups
    groups[0].replica_ids[:] = [0]
    groups.add(replica_ids=[1])


def use_newer_field(module, main):
    reduce = first(main, "all-reduce")
    reduce.collective_device_list.replica_groups.add(replica_ids=[0, 1])


def set_channel(module, main):
    first(main, "all-reduce").channel_id = 1


def use_device_ids(module, main):
    first(main, "all-gather").use_global_device_ids = True


def remove_reduce(module, main):
    reduce = first(main, "all-reduce")
    reduce.opcode = "negate"
    reduce.ClearField("replica_groups")
    reduce.ClearField("called_computation_ids")


def renumber(module, main):
    first(main, "dot").id = 2**31 + 5


def forward_reference(module, main):
    first(main, "dot").operand_ids[0] = main.instructions[-1].id


def wide_floats(module, main):
    first(main, "multiply").shape.element_type = 12


def wide_result(module, main):
    module.host_program_shape.result.tuple_shapes[0].element_type = 5


def complex_numbers(module, main):
    first(main, "add").shape.element_type = 15


def wide_callee(module, main):
    module.computations[0].instructions[0].shape.element_type = 9


def be_dynamic(module, main):
    first(main, "dot").shape.is_dynamic_dimension[0] = True


def another_operation(module, main):
    first(main, "dot").opcode = "sort"


def another_algorithm(module, main):
    first(main, "dot").precision_config.algorithm = 7


def lower_precision(module, main):
    first(main, "dot").precision_config.ClearField("operand_precision")


def call_dot(module, main):
    module.computations[0].instructions[-1].opcode = "dot"


def lose_root(module, main):
    main.root_id = 100000


def lose_entry(module, main):
    module.entry_computation_id = 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_groups, r"all-reduce\.\d+ has replica groups \{\{1,0\}\}, they must be \{\{0,1\}\}"),
        (split_groups, r"all-gather\.\d+ has replica groups \{\{0\},\{1\}\}, they must be \{\{0,1\}\}"),
        (use_newer_field, "has its replica groups in the newer field"),
        (set_channel, "has channel 1, use_global_device_ids False"),
        (use_device_ids, "has channel 0, use_global_device_ids True"),
        (remove_reduce, "has 1 all-reduce operations, its parts have 2"),
        (renumber, r"instruction dot\.\d+ has id 2147483653, ids count from 1 in program order"),
        (forward_reference, r"dot\.\d+ refers to id \d+, which is not before it"),
        (wide_floats, r"multiply\.\d+ has elements of f64, Neuron takes bf16, f32, pred, s32"),
        (wide_result, "the result has elements of s64"),
        (complex_numbers, r"add\.\d+ has elements of c64"),
        (wide_callee, r"parameter\.1 has elements of u64"),
        (be_dynamic, r"dot\.\d+ has a dynamic dimension in \[1, 6, 48\]"),
        (another_operation, r"operation 'sort' is not among those that parts are made of \(abs, add,"),
        (another_algorithm, r"dot\.\d+ asks for precision \[2, 2\], algorithm 7"),
        (lower_precision, r"dot\.\d+ asks for precision \[\], algorithm 0.*need \[2, 2\] \(HIGHEST\)"),
        (call_dot, "dot in region_1: only the entry computation has those"),
        (lose_root, "has root 100000, which it does not hold"),
        (lose_entry, "the entry computation 4000 is not there"),
    ],
)
def test_each_rule_is_kept(lower_block, change, message):
    proto = lower_block(2)[1]
    check_hlo(proto, **TWO)
    with pytest.raises(CompileError, match=message):
        check_hlo(changed(proto, change), **TWO)


def test_number_of_ranks_and_of_collectives(lower_block):
    with pytest.raises(CompileError, match=r"\{\{0,1\}\}, they must be \{\{0,1,2,3\}\}"):
        check_hlo(lower_block(2)[1], **{**TWO, "ranks": 4})
    with pytest.raises(CompileError, match="has 1 all-gather operations, its parts have 0"):
        check_hlo(lower_block(2)[1], **{**TWO, "all_gathers": 0})


def test_uncanonical_modules_are_refused(lower_block):
    with pytest.raises(CompileError, match="ids count from 1 in program order"):
        check_hlo(lower_block(2)[0].proto, **TWO)


def test_large_literals_are_refused():
    table = torch.arange(40000, dtype=torch.float32).reshape(200, 200).sin()

    class Inlined(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.register_buffer("table", table)

        def forward(self, x):
            return x @ self.table

    def checked(table):
        inputs = [TensorSpec("x", (2, table.shape[0]))]
        proto = lower_module(lambda collectives: Inlined(table), inputs, 1, "float32").proto
        return check_hlo(canonicalise(proto), **NONE)

    checked(table[:100, :100])
    with pytest.raises(CompileError, match=r"constant\.\d+ is a literal of 1600\d\d bytes, at most 65536"):
        checked(table)


def test_custom_calls_are_refused():
    with pytest.raises(CompileError, match=r"custom-call\.\d+ is a custom call of 'lapack_spotrf"):
        check_hlo(lower(torch.linalg.cholesky, (4, 4)), **NONE)
