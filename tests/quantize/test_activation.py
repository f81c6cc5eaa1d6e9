"""Scaled channels and low-rank branches: less output error than rounding alone, and what they are made of."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.activation import pack_awq, pack_low_rank
from fluxkiln.quantize.pack import bf16_to_float32, dequantize
from fluxkiln.quantize.statistics import gather
from tests.quantize.weights import make_inputs, make_weight, relative, relative_error

WIDTH = 256
SEEN, UNSEEN = make_inputs(2048, WIDTH, 1), make_inputs(512, WIDTH, 2)
STATISTICS = gather(SEEN, 0)


@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_awq(kind):
    weight = make_weight(kind, (192, WIDTH))
    made = pack_awq(weight, 64, STATISTICS)
    compilers = relative_error(weight, "W4BF16-rtn", inputs=UNSEEN)
    assert relative(made.dequantize(64), weight, UNSEEN) < 0.85 * compilers
    # what the graph computes: the input divided, then the codes
    x = UNSEEN / made.divisors @ dequantize(made.packed, 64).T
    np.testing.assert_allclose(x, UNSEEN @ made.dequantize(64).T, rtol=1e-3, atol=1e-3)
    assert made.rank == 0


@pytest.mark.parametrize("rank", [8, 32])
def test_low_rank_branch(rank):
    weight = make_weight("student", (192, WIDTH))
    made = pack_low_rank(weight, 64, STATISTICS, rank)
    compilers = relative_error(weight, "W4BF16-rtn", inputs=UNSEEN)
    assert made.rank == rank
    assert relative(made.dequantize(64), weight, UNSEEN) < (0.85 if rank == 8 else 0.75) * compilers
    branch = bf16_to_float32(made.up) @ bf16_to_float32(made.down)
    x = UNSEEN @ dequantize(made.packed, 64).T + UNSEEN @ branch.T
    np.testing.assert_allclose(x, UNSEEN @ made.dequantize(64).T, rtol=1e-3, atol=1e-3)
    # without what is known of the inputs the directions are worse ones
    assert relative(pack_low_rank(weight, 64, None, rank).dequantize(64), weight, UNSEEN) > relative(
        made.dequantize(64), weight, UNSEEN
    )


def test_shuffled_calibration_shows():
    weight = make_weight("student", (192, WIDTH))
    shuffled = gather(SEEN[:, np.random.default_rng(0).permutation(WIDTH)], 0)
    for pack in (pack_awq, pack_low_rank):
        sound = relative(pack(weight, 64, STATISTICS).dequantize(64), weight, UNSEEN)
        assert relative(pack(weight, 64, shuffled).dequantize(64), weight, UNSEEN) > 1.1 * sound


THREADS = """
import hashlib, sys
from fluxkiln.quantize.activation import pack_low_rank
from tests.quantize.weights import make_weight
made = pack_low_rank(make_weight("student", (700, 1024)), 64, None, 24)
found = hashlib.sha256(made.up.tobytes() + made.down.tobytes() + made.packed.codes_OI.tobytes()).hexdigest()
print(found)
"""


def test_a_branch_does_not_depend_on_the_number_of_threads():
    found = {
        subprocess.run(
            [sys.executable, "-c", THREADS], env={**os.environ, "OPENBLAS_NUM_THREADS": count}, check=True, text=True,
            stdout=subprocess.PIPE,
        ).stdout
        for count in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1, "codes cast on one machine would not be those that another verifies"


@pytest.mark.parametrize("rank", [0, 65])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(SchemeError, match=f"rank {rank}: a matrix of 64 x 128 has 1 to 64"):
        pack_low_rank(make_weight("gaussian", (64, 128)), 64, None, rank)
