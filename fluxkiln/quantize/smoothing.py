"""How W8A8 finds its numbers: input channels are divided by s_i, and the weight's multiplied, so that 8 bits fit both.

s = sizes^a / weights^(1 - a), and all of it times a number that puts the limit of the input's 8 bits where a quantile
of its sizes is. Exponent and quantile are those that leave the least output error, as the recorded sizes know it: what
is rounded and what is cut off of the input, by the weight that it meets, and what is rounded of the weight, by the
input. Weights that have one input in common share it.

Source: Xiao et al., SmoothQuant (arXiv 2211.10438), equation 4; the choice is our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.methods import Method, Source, rtn
from fluxkiln.quantize.side_tensors import RECIPROCALS, SideTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

# what a channel may become that was not seen: as a share of the median channel, and of its own largest
LEAST, BEYOND = 0.5, 1.25
EXPONENTS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
QUANTILES = (0.999, 0.9997, 0.9999, 0.99997, 1.0)


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
    divisors = find_smoothing(np.concatenate(sampled).astype(np.float32), statistics.sizes, statistics.count)
    return (SideTensors(divisors) for _ in sources)


def find_smoothing(
    weight_OI: NDArray[Any],
    sizes_IB: NDArray[Any],
    count: int,
    exponents: Sequence[float] = EXPONENTS,
    quantiles: Sequence[float] = QUANTILES,
) -> NDArray[Any]:
    """Float32 [I], of an input whose sizes were counted; what it is divided by has its limit at `integer.THRESHOLD`.

    They are reciprocals of bfloat16 numbers, since a chip multiplies. Inputs to come are believed to be larger than the
    `count` rows that were seen: a channel is taken for at least LEAST of the median one, and for one row more, in which
    every channel is BEYOND its largest.

    Raises:
        SchemeError: none leaves a finite error.
    """
    import numpy as np

    from fluxkiln.quantize.integer import LEVELS, THRESHOLD
    from fluxkiln.quantize.pack import bf16_to_float32, to_bf16_bits
    from fluxkiln.quantize.sizes import largest, middles

    inputs, weights = largest(sizes_IB), np.abs(weight_OI).max(0)
    inputs = np.maximum(inputs, LEAST * np.median(inputs))
    weights = np.maximum(weights, max(float(weights.max()) * 1e-4, 1e-12))
    seen = sizes_IB.astype(np.float64) / sizes_IB.sum(1, keepdims=True)
    shares = np.concatenate([seen, np.full((len(seen), 1), 1 / count)], axis=1)
    values = np.concatenate([np.broadcast_to(middles(), seen.shape), BEYOND * inputs[:, None]], axis=1)
    squares = (shares * np.square(values)).sum(1)
    meets = np.square(weight_OI).sum(0, dtype=np.float64)
    best, found = np.inf, None
    for exponent in exponents:
        divisors = inputs**exponent / weights ** (1 - exponent)
        scaled_IB = values / divisors[:, None]
        limits = _quantiles(scaled_IB, shares, quantiles)
        steps = np.abs(weight_OI * divisors).max(1) / LEVELS
        rounded = float(np.square(steps, dtype=np.float64).sum() / 12 * (squares / divisors**2).sum())
        for limit in limits:
            lost_IB = np.maximum(scaled_IB - limit, 0) ** 2 + np.square(limit / LEVELS) / 12
            lost = float((np.einsum("ib,ib->i", lost_IB, shares) * np.square(divisors) * meets).sum()) + rounded
            if lost < best:
                best, found = lost, divisors * (limit / THRESHOLD)
    if found is None:
        raise SchemeError("no channel scale leaves a finite error: the weight or its calibration is not finite")
    reciprocals: NDArray[Any] = np.reciprocal(bf16_to_float32(to_bf16_bits(1 / found)))
    return reciprocals


def _quantiles(values_IB: NDArray[Any], shares_IB: NDArray[Any], quantiles: Sequence[float]) -> list[float]:
    """Of values that have these shares of their channels, all channels together."""
    import numpy as np

    held = shares_IB > 0
    values, shares = values_IB[held], shares_IB[held]
    order = np.argsort(values)
    summed = np.cumsum(shares[order])
    places = np.searchsorted(summed, np.array(quantiles) * summed[-1])
    return [float(values[order[min(place, order.size - 1)]]) for place in places]


METHOD = Method(rtn.METHOD.rounder, calibrated=True, roles=(RECIPROCALS,), side_tensors=smooth)
