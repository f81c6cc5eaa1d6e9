"""XLA of June 2023, jaxlib 0.4.13 in an environment of its own: it reads every module, and computes what today's does.

`FLUXKILN_OLD_XLA` names a finished environment; else the first test makes one beside the main one, of three packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fluxkiln.build.make import prepare
from fluxkiln.compile.environment import Environment
from fluxkiln.compile.toolchains.neuron.hlo_module import parse_module
from fluxkiln.compile.toolchains.neuron.modules import lower_modules
from fluxkiln.errors import FluxkilnError
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings

pytest.importorskip("jax")
pytestmark = pytest.mark.thorough
HERE = Path(__file__).resolve().parent
KINDS = ("clip", "t5", "head", "double", "single", "tail", "vae_decoder")
# PROTO [INPUTS.npz OUT.npz]: parsed as a whole; compiled and run on one replica where inputs are given
WORKER = """
import sys, numpy as np
from jaxlib import xla_client
module = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(open(sys.argv[1], "rb").read()))
print(module.count("hlo.all_reduce"), module.count("hlo.all_gather"))
if len(sys.argv) > 2:
    client, given = xla_client.make_cpu_client(), np.load(sys.argv[2])
    program = client.compile(module, xla_client.CompileOptions())
    made = program.execute([client.buffer_from_pyval(given[str(i)]) for i in range(len(given.files))])
    np.savez(sys.argv[3], *[np.asarray(one) for one in made])
"""


@pytest.fixture(scope="module")
def old_xla(tmp_path_factory):
    """Runs the worker on a proto and maybe inputs -> what it printed, and its outputs."""
    env = Environment(
        title="XLA of 2023", folder=".venv-xla-2023", cached="xla-2023", variable="FLUXKILN_OLD_XLA",
        needed_bytes=400_000_000, pins=HERE / "xla-2023.txt", python=lambda: Path(sys.executable),
        finish=lambda root, tell: {"jaxlib": "0.4.13"},
    )  # fmt: skip
    if sys.version_info >= (3, 12):
        pytest.skip("jaxlib 0.4.13 has no wheel for Python 3.12 or later")
    try:
        env.ensure(print)
    except FluxkilnError as error:
        pytest.skip(f"jaxlib 0.4.13 cannot be installed here: {error}")
    folder = tmp_path_factory.mktemp("old")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(proto, inputs=None):
        (folder / "module.pb").write_bytes(proto)
        files = []
        if inputs is not None:
            np.savez(folder / "in.npz", **{str(i): one for i, one in enumerate(inputs)})
            files = [folder / "in.npz", folder / "out.npz"]
        command = [env.root / "bin" / "python", "-c", WORKER, folder / "module.pb", *files]
        done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split(), [*np.load(files[1]).values()] if files else []

    return run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(Settings("trn2", "tiny-dev", build_dir=tmp_path_factory.mktemp("trn2"), tp_degree=2))


def test_it_reads_every_module(old_xla, prepared):
    modules = lower_modules(prepared.checkpoint, prepared.plan, prepared.cache, Silent())
    assert {module.kind for module in modules.values()} == set(KINDS)
    for name, module in modules.items():
        (reduces, gathers), _ = old_xla(module.hlo.read_bytes())
        counts = (len(module.facts["all_reduce_bytes"]), len(module.facts["all_gather_bytes"]))
        assert (int(reduces), int(gathers)) == counts, name


def arguments(module):
    """Activations and weights of the sizes that trained ones have."""
    random = np.random.default_rng(3)
    for spec in module.parameters:
        if "int" in spec.dtype:
            yield random.integers(0, 64, spec.shape).astype(spec.dtype)
        else:
            spread = spec.shape[-1] ** -0.5 if spec in module.slots and len(spec.shape) > 1 else 0.5
            yield (random.standard_normal(spec.shape) * spread).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_todays_computes(old_xla, prepared, replicas, kind):
    """One replica, float32; sums run in another order: 1e-6 was measured."""
    modules = lower_modules(prepared.checkpoint, prepared.plan, prepared.cache, Silent(), "float32", degree=1)
    module = next(one for one in modules.values() if one.kind == kind)
    proto, given = module.hlo.read_bytes(), [*arguments(module)]
    process = replicas(1)
    (expected,) = process.run(process.load(proto), [given])
    _, found = old_xla(proto, given)
    for made, wanted in zip(found, expected, strict=True):
        assert np.isfinite(wanted).all()
        assert np.linalg.norm(made - wanted) <= 1e-5 * np.linalg.norm(wanted)
    if kind == "single":
        given[0] = given[0] + 0.1
        _, other = old_xla(proto, given)
        assert np.linalg.norm(other[0] - expected[0]) > 1e-3 * np.linalg.norm(expected[0])


def test_what_it_cannot_read_is_seen(old_xla, prepared):
    """Ids beyond 32 bits, as jaxlib writes them, are what the canonical form takes away."""
    modules = lower_modules(prepared.checkpoint, prepared.plan, prepared.cache, Silent())
    module = parse_module(modules["clip"].hlo.read_bytes())
    module.computations[0].instructions[-1].opcode = "no-such-operation"
    with pytest.raises(AssertionError, match="no-such-operation"):
        old_xla(module.SerializeToString(deterministic=True))
