"""How W8A8 finds its numbers: input channels are divided by s_i, and the weight's multiplied, so that 8 bits fit both.

s = sizes^a / weights^(1 - a), and all of it times a number with which the largest input that was seen fits 8 bits. The
exponent is the one that leaves the least output error, as the recorded sizes know it: what is rounded of the input, by
the weight that it meets, and what is rounded of the weight, by the input. Nothing is cut off on purpose: what is cut
off of one token adds up, what is rounded does not (`docs/numerics.md`). Weights that have one input in common share s.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), equation 4; the choice is our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.methods import Method, Source, rtn
from fluxkiln.quantize.side_tensors import RECIPROCALS, SideTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

# what a channel may become that was not seen: as a share of the median channel, and of its own largest
LEAST, BEYOND = 0.5, 1.25
# how much larger than seen a product may become that a gate is multiplied by; and the least gain, as a power of two
ROOM, LEAST_GAIN = 4.0, -4
EXPONENTS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)


def smooth(sources: Sequence[Source], group_size: int, bits: int, rank: int, most_rows: int) -> Iterator[SideTensors]:
    """The same divisors for all; SchemeError without sizes of the input, or where a channel was never but 0."""
    import numpy as np

    from fluxkiln.quantize.calibration import mean_statistics

    known = [source.statistics for source in sources if source.statistics is not None]
    if not known or known[0].sizes is None:
        raise SchemeError("W8A8 needs calibration; make some with fluxkiln calibrate")
    statistics = mean_statistics(known)
    if (dead := np.flatnonzero(statistics.peaks == 0)).size:
        raise SchemeError(
            f"input channel {dead[0]} was 0 whenever it was calibrated, so no scale is known for it; calibrate with "
            "more prompts or steps, or leave the weight out of the codes (W8A8,KIND.WEIGHT=BF16)"
        )
    assert statistics.sizes is not None
    most = most_rows // len(sources)
    sampled = [(weight := source.read())[:: -(-len(weight) // most) if most else 1] for source in sources]
    divisors = find_smoothing(np.concatenate(sampled).astype(np.float32), statistics.sizes)
    return (SideTensors(divisors) for _ in sources)


def find_smoothing(
    weight_OI: NDArray[Any], sizes_IB: NDArray[Any], exponents: Sequence[float] = EXPONENTS
) -> NDArray[Any]:
    """Float32 [I], of an input whose sizes were counted; what it is divided by has its limit at `integer.THRESHOLD`.

    They are reciprocals of bfloat16 numbers, since a chip multiplies. Inputs to come may be larger than those that were
    seen: a channel is taken for at least LEAST of the median one, and for BEYOND its largest.

    Raises:
        SchemeError: none leaves a finite error.
    """
    import numpy as np

    from fluxkiln.quantize.integer import LEVELS, THRESHOLD
    from fluxkiln.quantize.pack import bf16_to_float32, to_bf16_bits
    from fluxkiln.quantize.sizes import largest, middles

    seen, weights = largest(sizes_IB), np.abs(weight_OI).max(0)
    inputs: NDArray[Any] = BEYOND * np.maximum(seen, LEAST * np.median(seen))
    weights = np.maximum(weights, max(float(weights.max()) * 1e-4, 1e-12))
    shares = sizes_IB.astype(np.float64) / sizes_IB.sum(1, keepdims=True)
    squares = (shares * np.square(middles())).sum(1)
    meets = np.square(weight_OI).sum(0, dtype=np.float64)
    best, found = np.inf, None
    for exponent in exponents:
        divisors = inputs**exponent / weights ** (1 - exponent)
        step = float((inputs / divisors).max()) / LEVELS
        rows = np.abs(weight_OI * divisors).max(1) / LEVELS
        of_inputs = step**2 * (np.square(divisors, dtype=np.float64) * meets).sum()
        of_weights = np.square(rows, dtype=np.float64).sum() * (squares / np.square(divisors)).sum()
        if (lost := float(of_inputs + of_weights)) < best:
            best, found = lost, divisors * (step * LEVELS / THRESHOLD)
    if found is None:
        raise SchemeError("no channel scale leaves a finite error: the weight or its calibration is not finite")
    reciprocals: NDArray[Any] = np.reciprocal(bf16_to_float32(to_bf16_bits(1 / found)))
    return reciprocals


def find_gains(largest_O: NDArray[Any]) -> NDArray[Any]:
    """Powers of two, float32 [O], of products as large as this at most: divided by them they leave room.

    What is small already is made larger by so much only that its multipliers fit. Not all are equal: a compiler makes
    something else of a product with one number than of a product with a vector.
    """
    import numpy as np

    from fluxkiln.quantize.integer import THRESHOLD

    exponents = np.ceil(np.log2(np.maximum(largest_O, 1e-30) / (THRESHOLD / ROOM)))
    found: NDArray[Any] = np.exp2(np.maximum(exponents, LEAST_GAIN)).astype(np.float32)
    found[0] *= 2 if (found == found[0]).all() else 1
    return found


def check_limit(norms: Mapping[str, NDArray[Any]], limit: int) -> None:
    """Raise SchemeError where queries or keys with these weights of norms, slot -> [K], may be larger than `limit`.

    A normalized head has K numbers whose squares add up to K, and rotation keeps the length of a pair: so no number is
    larger than the largest weight times K^1/2, and no product of a query and a key than the square of that.
    """
    import numpy as np

    for slot, weight in norms.items():
        if (most := float(np.abs(weight).max()) * math.sqrt(len(weight))) > limit:
            raise SchemeError(
                f"queries or keys may reach {most:.3g} with {slot}, W8A8-qk{limit} holds {limit}; ask for "
                f"W8A8-qk{math.ceil(most)} there, or for W8A8"
            )


METHOD = Method(rtn.METHOD.rounder, calibrated=True, roles=(RECIPROCALS,), side_tensors=smooth)
