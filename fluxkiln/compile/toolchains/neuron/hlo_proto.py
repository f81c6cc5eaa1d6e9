"""The messages of XLA's HLO module proto, described as far as lowering for Neuron needs them.

Built at import of protobuf's own descriptors, so that no TensorFlow and no generated file is needed. What is passed on
or dropped whole is declared `bytes`, which is the same on the wire as a message. A field that is not described here is
refused on parsing: it might hold an id or a path that the canonical form has to know of.

`newer_98` is what jaxlib 0.10.2 writes into every convolution, empty; the published schema has no such number yet.

Source: `xla/service/hlo.proto` and `xla/xla_data.proto` of github.com/openxla/xla; field numbers are theirs.
"""

from __future__ import annotations

import functools
from typing import Any

from fluxkiln.errors import CompileError
from fluxkiln.types import TensorSpec

# name, number, type; `*` marks repeated fields
_FIELDS = {
    "Module": """
        name 1 string, entry_computation_name 2 string, computations 3 Computation*,
        host_program_shape 4 ProgramShape, id 5 int64, entry_computation_id 6 int64,
        input_output_alias 8 bytes, is_dynamic 11 bool,
        stack_frame_index 17 bytes, buffer_donor 18 bytes, frontend_attributes 19 bytes,
        original_value_recovery_table 20 bytes""",
    "Computation": """
        name 1 string, instructions 2 Instruction*, program_shape 4 ProgramShape, id 5 int64, root_id 6 int64,
        execution_thread 8 string""",
    "Instruction": """
        name 1 string, opcode 2 string, shape 3 Shape, metadata 7 bytes, literal 8 bytes, parameter_number 9 int64,
        tuple_index 13 int64, dimensions 14 int64*, window 15 bytes,
        convolution_dimension_numbers 16 ConvolutionNumbers,
        slice_dimensions 17 bytes*, padding_config 21 bytes, channel_id 26 int64, custom_call_target 28 string,
        dot_dimension_numbers 30 DotNumbers, gather_dimension_numbers 33 bytes, gather_slice_sizes 34 int64*,
        id 35 int64, operand_ids 36 int64*, called_computation_ids 38 int64*, backend_config 43 bytes,
        replica_groups 49 ReplicaGroup*, feature_group_count 50 int64, precision_config 51 Precision,
        constrain_layout 56 bool, operand_shapes_with_layout 57 bytes*, batch_group_count 58 int64,
        comparison_direction 63 string,
        custom_call_has_side_effect 65 bool, output_operand_aliasing 74 bytes*, custom_call_schedule 76 int32,
        indices_are_sorted 67 bool, frontend_attributes 68 bytes, unique_indices 69 bool,
        use_global_device_ids 71 bool, comparison_type 72 string, padding_type 75 int32,
        custom_call_api_version 77 int32, statistics_viz 82 bytes,
        collective_device_list 87 DeviceList, original_value 88 bytes,
        result_accuracy 91 bytes,
        newer_98 98 bytes""",
    "Shape": """
        element_type 2 int32, dimensions 3 int64*, tuple_shapes 4 Shape*, layout 5 bytes,
        is_dynamic_dimension 6 bool*""",
    "ProgramShape": "parameters 1 Shape*, result 2 Shape, parameter_names 3 string*",
    "ConvolutionNumbers": """
        kernel_input_feature_dimension 3 int64, kernel_output_feature_dimension 4 int64,
        kernel_spatial_dimensions 6 int64*, input_batch_dimension 7 int64, input_feature_dimension 8 int64,
        output_batch_dimension 9 int64, output_feature_dimension 10 int64, input_spatial_dimensions 11 int64*,
        output_spatial_dimensions 12 int64*""",
    "DotNumbers": """
        lhs_contracting_dimensions 1 int64*, rhs_contracting_dimensions 2 int64*, lhs_batch_dimensions 3 int64*,
        rhs_batch_dimensions 4 int64*""",
    "Precision": "operand_precision 1 int32*, algorithm 2 int32",
    "ReplicaGroup": "replica_ids 1 int64*",
    "DeviceList": "replica_groups 1 ReplicaGroup*, iota 2 Iota",
    "Iota": "groups 1 int64, group_size 2 int64, reshape_dimensions 3 int64*, permutation 4 int32*",
}  # fmt: skip

# PrimitiveType -> name as XLA's text form has it, bytes of an element
ELEMENTS = {
    1: ("pred", 1), 2: ("s8", 1), 3: ("s16", 2), 4: ("s32", 4), 5: ("s64", 8), 6: ("u8", 1), 7: ("u16", 2),
    8: ("u32", 4), 9: ("u64", 8), 10: ("f16", 2), 11: ("f32", 4), 12: ("f64", 8), 13: ("tuple", 0), 15: ("c64", 8),
    16: ("bf16", 2), 17: ("token", 0), 18: ("c128", 16),
}  # fmt: skip


def parse_module(proto: bytes) -> Any:
    """An HloModuleProto, fields as in `_FIELDS`.

    Raises:
        CompileError: the bytes are no HLO module, or hold a field that is not described.
    """
    from google.protobuf.message import DecodeError

    module = _module_class()()
    try:
        module.ParseFromString(proto)
    except DecodeError as error:
        raise CompileError(
            f"{len(proto)} bytes that are no HLO module proto ({error}); lower the module again"
        ) from error
    known = module.ByteSize()
    module.DiscardUnknownFields()
    if module.ByteSize() != known or not module.computations:
        raise CompileError(
            f"the HLO module {module.name!r} has {known - module.ByteSize()} bytes in fields that are not known here "
            f"and {len(module.computations)} computations; lower it with the pinned jaxlib, or describe the field in "
            "fluxkiln/compile/toolchains/neuron/hlo_proto.py"
        )
    return module


@functools.cache
def _module_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field_type: Any = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="fluxkiln/hlo.proto", package="fluxkiln.hlo", syntax="proto3")
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for field in fields.split(","):
            name, number, kind = field.split()
            repeated = kind.endswith("*")
            added = described.field.add(
                name=name,
                number=int(number),
                label=field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL,
            )
            kind = kind.removesuffix("*")
            if kind in _FIELDS:
                added.type, added.type_name = field_type.TYPE_MESSAGE, f".fluxkiln.hlo.{kind}"
            else:
                added.type = getattr(field_type, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("fluxkiln.hlo.Module"))


_NUMPY_NAMES = {"pred": "bool", "s32": "int32", "f32": "float32", "bf16": "bfloat16", "s64": "int64", "f64": "float64"}


def entry_parameters(proto: bytes) -> tuple[TensorSpec, ...]:
    """What a module takes, in order, named after their number; errors as `parse_module`."""
    shapes = parse_module(proto).host_program_shape.parameters
    return tuple(
        TensorSpec(f"p{index}", tuple(shape.dimensions), _NUMPY_NAMES.get(ELEMENTS[shape.element_type][0], "unknown"))
        for index, shape in enumerate(shapes)
    )
