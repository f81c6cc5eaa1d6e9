"""Where ONNX Runtime and onnx read weights: the table that the module's docstring gives, tried here."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from fluxkiln.compile.onnx.external_data import ALIGNMENT, Sidecar, external_range, in_place_tensor
from fluxkiln.types import TensorRef

START = 9
WEIGHT = np.arange(64, dtype=np.float32).reshape(8, 8)
PLACES = {  # name of the file in the graph -> does ONNX Runtime read it, does onnx
    "weights.bin": (True, True),
    "sub/weights.bin": (True, True),
    "hard.bin": (True, False),
    "link_inside.bin": (True, False),
    "link_outside.bin": (False, False),
    "linked_folder/weights.bin": (False, False),
    "../outside/weights.bin": (False, False),
    "ABSOLUTE": (False, False),
}


def write_graph(path, location):
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=WEIGHT.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(START)), ("length", str(WEIGHT.nbytes))):
        tensor.external_data.add(key=key, value=value)
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def runs(graph, options=None):
    """Whether ONNX Runtime opens the graph; what it computes then must be right."""
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(graph, options)
    except Exception:
        return False
    row = np.ones((1, 8), np.float32)
    assert np.array_equal(session.run(None, {"x": row})[0], row @ WEIGHT)
    return True


@pytest.fixture
def folders(tmp_path):
    """(folder of the graph, folder elsewhere), with the same weights in every place."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, inside / "sub", outside):
        folder.mkdir()
    for file in (inside / "weights.bin", inside / "sub" / "weights.bin", outside / "weights.bin"):
        file.write_bytes(bytes(START) + WEIGHT.tobytes())
    (outside / "second.bin").write_bytes((outside / "weights.bin").read_bytes())
    os.link(outside / "second.bin", inside / "hard.bin")
    (inside / "link_inside.bin").symlink_to("sub/weights.bin")
    (inside / "link_outside.bin").symlink_to(outside / "weights.bin")
    (inside / "linked_folder").symlink_to(outside)
    return inside, outside


@pytest.mark.parametrize(("location", "read"), PLACES.items())
def test_places(location, read, folders):
    inside, outside = folders
    graph = write_graph(inside / "g.onnx", str(outside / "weights.bin") if location == "ABSOLUTE" else location)
    try:
        onnx.load(graph)
        loads = True
    except (onnx.checker.ValidationError, ValueError):
        loads = False
    assert (runs(graph), loads) == read


def test_hub_cache(tmp_path):
    """Snapshots are links into `blobs`: a graph there cannot read them, one in the folder above both can."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_bytes(bytes(START) + WEIGHT.tobytes())
    (snapshot / "weights.bin").symlink_to("../../blobs/abc")
    assert not runs(write_graph(snapshot / "g.onnx", "weights.bin"))
    assert runs(write_graph(tmp_path / "g.onnx", "blobs/abc"))


def test_session_options_reach_further(folders):
    inside, outside = folders
    graph = write_graph(inside / "g.onnx", "other.bin")
    (outside / "weights.bin").rename(outside / "other.bin")
    assert not runs(graph)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(outside))
    assert runs(graph, options)


def test_in_place_tensor(tmp_path):
    (tmp_path / "linked").symlink_to(tmp_path)
    ref = TensorRef("w", tmp_path / "linked" / "shard", "BF16", (2, 3), 40, 12)
    tensor = in_place_tensor("slot", ref, tmp_path)
    assert external_range(tensor) == ("shard", 40, 12)
    assert (tensor.name, list(tensor.dims), tensor.data_type) == ("slot", [2, 3], onnx.TensorProto.BFLOAT16)


def test_sidecar(tmp_path):
    sidecar = Sidecar(tmp_path / "w.bin")
    assert sidecar.take() == {}
    assert not sidecar.path.exists()
    arrays = {
        "a": np.arange(5, dtype=np.float32),
        "b": np.ones((3, 3), ml_dtypes.bfloat16),
        "c": np.arange(4.0).reshape(2, 2).T,
    }
    for name, array in arrays.items():
        sidecar.append(name, array)
    taken = sidecar.take()
    assert sidecar.take() == {}
    data = sidecar.path.read_bytes()
    for name, tensor in taken.items():
        location, offset, length = external_range(tensor)
        assert (location, offset % ALIGNMENT) == ("w.bin", 0)
        stored = arrays[name] if arrays[name].dtype.itemsize <= 4 else arrays[name].astype(np.float32)
        assert data[offset : offset + length] == np.ascontiguousarray(stored).tobytes()
