"""A whole component as one ONNX graph: every kind a function of the file, every part a call of it with its weights.

A kind's graph is in the file once, however many blocks there are: FLUX.1-dev's transformer is 4 functions, 59 calls and
1160 initializers, 0.3 MB. The initializers are called as in the checkpoint. ONNX Runtime (tried: 1.31.1) inlines the
functions when it opens the file; what cannot take functions gets them inlined by `onnx.inliner.inline_local_functions`.

What passes between parts is not written down a second time: a part's input is the last output of that name, and the
transformer's streams are joined, text first, before the first part that wants them joint, and cut apart after the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fluxkiln.errors import ExportError, UsageError
from fluxkiln.types import Part

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

_Named = TypeVar("_Named", "ValueInfoProto", "TensorProto")

DOMAIN = "fluxkiln"
PRODUCER = "fluxkiln"
# functions of a model are part of the format since this version of it
_LEAST_IR = 8
_IMAGE, _TEXT = "hidden_states", "encoder_hidden_states"
_JOINT = "joint_hidden_states"
_OUT = "_out"
# the input that every part has of its own, called as the part that gives it; all others are the same for all parts
_OWN = ("modulation",)


@dataclass(frozen=True, slots=True)
class LinkedPart:
    """A part's own graph whose weights are initializers in other files.

    Attributes:
        model: an `onnx.ModelProto`; parts of a kind have equal nodes.
        weights: initializer that lies elsewhere -> what it is called in the component, the checkpoint's name say.
        giver: the part that gives what it does not share with others, its modulation.
    """

    part: Part
    model: Any
    weights: Mapping[str, str]
    giver: str = ""


def component_graphs(parts: Iterable[Part], component: str, known: tuple[str, ...]) -> dict[str, tuple[Part, ...]]:
    """Graph -> its parts in the order they run, for one component of those `known`: one graph, called like it.

    Of a transformer in the hoisted form two: what runs once per image is `transformer_modulation`, whose outputs have a
    row for each step; the row of a step is what `transformer` takes under the same names.

    Raises:
        UsageError: there is no such component.
    """
    if component not in known:
        raise UsageError(f"no component is called {component!r}; there are {', '.join(known)}")
    own = tuple(part for part in parts if part.component == component)
    graphs = {
        f"{component}_modulation": tuple(part for part in own if part.traits.rows),
        component: tuple(part for part in own if not part.traits.rows),
    }
    return {name: members for name, members in graphs.items() if members}


def stitch_parts(name: str, linked: Sequence[LinkedPart]) -> ModelProto:
    """One model that runs the parts one after the other.

    Its inputs are those that no part before gives (an input that every part has under one name is one input), its
    outputs those that no part after takes: by the names of the kinds without `_out` where these are clear, else as
    `part/name`.

    Args:
        name: of the graph.
        linked: in the order they run, all with weights relative to one folder.

    Raises:
        ExportError: there are no parts, they are of different opsets, or two weights have one name.
    """
    if not linked:
        raise ExportError(f"{name} has no parts, a graph needs at least one")
    stitching = _Stitching()
    for one in linked:
        stitching.add(one)
    return stitching.finish(name)


class _Stitching:
    """The graph so far, and which of its values is called what in the next part."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.inputs: dict[str, ValueInfoProto] = {}
        self.between: dict[str, ValueInfoProto] = {}
        self.weights: dict[str, TensorProto] = {}
        self.constants: dict[str, TensorProto] = {}
        self.functions: dict[tuple[str, bytes], Any] = {}
        self.current: dict[str, str] = {}  # name of an input of parts -> value of the graph
        self.unread: dict[str, None] = {}
        self.opsets: dict[str, int] = {}
        self.ir_version = _LEAST_IR
        self.text = ""  # the value that holds the text, while the streams are joint

    def add(self, one: LinkedPart) -> None:
        """Append a call of the part's kind."""
        from onnx.helper import make_node

        graph = one.model.graph
        self._check_opsets(one)
        names = [value.name for value in graph.input]
        self._shape_streams(names)
        arguments = []
        for value in graph.input:
            argument = self.current.get(value.name)
            if argument is None:
                argument = f"{one.giver}/{value.name}" if value.name in _OWN else value.name
                self.inputs.setdefault(argument, _renamed(value, argument))
            arguments.append(argument)
        outputs = []
        for value in graph.output:
            result = f"{one.part.name}/{value.name.removesuffix(_OUT)}"
            self.between[result] = _renamed(value, result)
            outputs.append(result)
        function, weights = self._function(one)
        call = make_node(function, [*arguments, *weights], outputs, one.part.name, domain=DOMAIN)
        self.nodes.append(call)
        self._read(arguments)
        for value, result in zip(graph.output, outputs, strict=True):
            self.current[value.name.removesuffix(_OUT)] = result
            self.unread[result] = None

    def finish(self, name: str) -> ModelProto:
        from onnx import OperatorSetIdProto
        from onnx.helper import make_graph, make_model, make_opsetid

        # the last values take the plain names that a caller asks for, where only one thing is called so
        short = {result: result.partition("/")[2] for result in self.unread}
        taken = [*short.values(), *self.inputs]
        plain = {result: name if taken.count(name) == 1 else result for result, name in short.items()}
        for node in self.nodes:
            node.output[:] = [plain.get(result, result) for result in node.output]
        graph = make_graph(
            self.nodes,
            name,
            list(self.inputs.values()),
            [_renamed(self.between[result], final) for result, final in plain.items()],
            [*self.constants.values(), *self.weights.values()],
            value_info=[value for result, value in self.between.items() if result not in plain],
        )
        opsets: list[OperatorSetIdProto] = [make_opsetid(domain, version) for domain, version in self.opsets.items()]
        return make_model(
            graph,
            functions=list(self.functions.values()),
            opset_imports=[*opsets, make_opsetid(DOMAIN, 1)],
            ir_version=self.ir_version,
            producer_name=PRODUCER,
        )

    def _check_opsets(self, one: LinkedPart) -> None:
        opsets = {opset.domain: opset.version for opset in one.model.opset_import}
        if self.opsets and opsets != self.opsets:
            raise ExportError(
                f"part {one.part.name} is of opsets {opsets}, the parts before it of {self.opsets}; export all of a "
                "component in one format"
            )
        self.opsets = opsets
        self.ir_version = max(self.ir_version, one.model.ir_version)

    def _shape_streams(self, names: Sequence[str]) -> None:
        """Join the transformer's streams for a part that wants them joint, or take the image's tokens out again."""
        import numpy as np
        from onnx.helper import make_node
        from onnx.numpy_helper import from_array

        if "rotary_cos" not in names and not self.text:
            return
        joint = "rotary_cos" in names and _TEXT not in names
        if joint and not self.text:
            text, image = self.current[_TEXT], self.current[_IMAGE]
            self.nodes.append(make_node("Concat", [text, image], [_JOINT], "join_streams", axis=1))
            self._read((text, image))
            self.text, self.current[_IMAGE] = text, _JOINT
        elif self.text and not joint:
            tokens = self.between[self.text].type.tensor_type.shape.dim[1].dim_value
            bounds = {"first_image_token": tokens, "end_of_tokens": np.iinfo(np.int64).max, "token_axis": 1}
            for key, number in bounds.items():
                self.constants[key] = from_array(np.array([number], np.int64), key)
            value = self.current[_IMAGE]
            self.nodes.append(make_node("Slice", [value, *bounds], ["image_hidden_states"], "take_image"))
            self._read((value,))
            self.text, self.current[_IMAGE] = "", "image_hidden_states"

    def _function(self, one: LinkedPart) -> tuple[str, list[str]]:
        """The function that is the part's kind, made at the first part of it, and the part's weights in its order."""
        from onnx.helper import make_function, make_node

        graph = one.model.graph
        own = [tensor for tensor in graph.initializer if tensor.name in one.weights]
        constants = [tensor for tensor in graph.initializer if tensor.name not in one.weights]
        function = make_function(
            DOMAIN,
            one.part.kind,
            [*(value.name for value in graph.input), *(tensor.name for tensor in own)],
            [value.name for value in graph.output],
            [*(make_node("Constant", [], [tensor.name], value=tensor) for tensor in constants), *graph.node],
            list(one.model.opset_import),
        )
        key = (one.part.kind, function.SerializeToString(deterministic=True))
        if key not in self.functions:
            # parts of a kind differ where the checkpoint stores some of their weights in another type
            versions = sum(kind == one.part.kind for kind, _ in self.functions)
            function.name = f"{one.part.kind}_{versions + 1}" if versions else one.part.kind
            self.functions[key] = function
        return self.functions[key].name, [self._weight(tensor, one.weights[tensor.name]) for tensor in own]

    def _weight(self, tensor: TensorProto, name: str) -> str:
        renamed = _renamed(tensor, name)
        if self.weights.setdefault(name, renamed) != renamed:
            raise ExportError(f"two weights are called {name} and lie in different places")
        return name

    def _read(self, values: Iterable[str]) -> None:
        for value in values:
            self.unread.pop(value, None)


def _renamed(value: _Named, name: str) -> _Named:
    renamed = type(value)()
    renamed.CopyFrom(value)
    renamed.name = name
    return renamed
