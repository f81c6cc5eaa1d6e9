"""Runs HLO modules as replicas on virtual CPU devices, in a process of its own: their number is set when XLA starts.

One JSON request a line on stdin, one JSON answer a line on the stream that was stdout (XLA and jax may print there, so
their prints are sent to stderr). Arrays lie in one file a request, each at the offset its entry [dtype, shape, offset]
names. Requests:
    {"do": "load", "file": path}                        -> {"ok": true, "program": number}
    {"do": "keep", "file": path, "ranks": [[entry]]}    -> {"ok": true, "kept": number}
    {"do": "forget", "kept": number}                    -> {"ok": true}
    {"do": "run", "program": number, "file": path, "ranks": [[entry]], "kept": number or null, "results": path}
                                                        -> {"ok": true, "ranks": [[entry]]}
What fails answers {"ok": false, "error": text}.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jaxlib import _jax, xla_client
from jaxlib.mlir import ir
from numpy.typing import NDArray

_Request = dict[str, Any]
_Entry = list[Any]

_numbers = itertools.count()
_programs: dict[int, Any] = {}
_kept: dict[int, list[list[Any]]] = {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    actions: dict[str, Callable[[_Request], dict[str, Any]]]
    actions = {"load": load, "keep": keep, "forget": forget, "run": run}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": True, **actions[request["do"]](request)}
        except Exception as error:  # whatever XLA raises belongs into the answer
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load(request: _Request) -> dict[str, Any]:
    """Compile a proto for as many replicas as there are devices."""
    devices = jax.devices()
    with open(request["file"], "rb") as file:
        portable = _jax.mlir.hlo_to_stablehlo(file.read())
    client: Any = devices[0].client
    options = compiler.get_compile_options(
        num_replicas=len(devices), num_partitions=1, device_assignment=np.arange(len(devices)), backend=client
    )
    options.executable_build_options.use_spmd_partitioning = False
    with mlir.make_ir_context():
        module = ir.Module.parse(portable)
        program = client.compile_and_load(module, xla_client.DeviceList(tuple(devices)), options)
    number = next(_numbers)
    _programs[number] = program
    return {"program": number}


def keep(request: _Request) -> dict[str, Any]:
    number = next(_numbers)
    _kept[number] = placed(request)
    return {"kept": number}


def forget(request: _Request) -> dict[str, Any]:
    del _kept[request["kept"]]
    return {}


def run(request: _Request) -> dict[str, Any]:
    kept = _kept[request["kept"]] if request["kept"] is not None else [[] for _ in jax.devices()]
    ranks = [first + then for first, then in zip(placed(request), kept, strict=True)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("replicas",))
    # "replicated" to jax, which does not compare: each device has its own values
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [
        jax.make_array_from_single_device_arrays(arrays[0].shape, everywhere, list(arrays))
        for arrays in zip(*ranks, strict=True)
    ]
    results = _programs[request["program"]].execute_sharded(arguments).disassemble_into_single_device_arrays()
    entries: list[list[_Entry]] = [[] for _ in ranks]
    with open(request["results"], "wb") as file:
        for output in results:
            for rank, array in enumerate(output):
                values = np.asarray(array)
                entries[rank].append([values.dtype.name, values.shape, file.tell()])
                values.reshape(-1).view(np.uint8).tofile(file)
    return {"ranks": entries}


def placed(request: _Request) -> list[list[Any]]:
    """The arrays of a request, each rank's on its device; what ranks share in the file is read once."""
    return [
        [jax.device_put(read(request["file"], entry), device) for entry in entries]
        for entries, device in zip(request["ranks"], jax.devices(), strict=True)
    ]


def read(file: str, entry: _Entry) -> NDArray[Any]:
    name, shape, offset = entry
    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    count = int(np.prod(shape, dtype=np.int64))
    return np.fromfile(file, dtype, count, offset=offset).reshape(shape)


if __name__ == "__main__":
    main()
