"""`awq`: input channel i of the weight is multiplied by s_i and the input divided by it, so that the channels that
matter get finer steps. s = peaks^a, with the exponent a that leaves the least output error; weights that have one input
in common share it, so that it is divided once.

Source: Lin et al., AWQ (arXiv 2306.00978), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.methods import Method, Source, ls
from fluxkiln.quantize.side_tensors import RECIPROCALS, SideTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.quantize.calibration import Statistics

_EXPONENTS = tuple(step / 12 for step in range(12))


def side_tensors(
    sources: Sequence[Source], group_size: int, bits: int, rank: int, most_rows: int
) -> Iterator[SideTensors]:
    """The same divisors for all; SchemeError without statistics, or as `find_divisors`."""
    import numpy as np

    from fluxkiln.quantize.calibration import mean_statistics

    known = [source.statistics for source in sources if source.statistics is not None]
    if not known:
        raise SchemeError("awq needs calibration; make some with fluxkiln calibrate")
    most = most_rows // len(sources)
    # of each weight at most so many rows, from everywhere in it; all of them for 0
    sampled = [(weight := source.read())[:: -(-len(weight) // most) if most else 1] for source in sources]
    divisors = find_divisors(np.concatenate(sampled), group_size, mean_statistics(known), bits)
    return (SideTensors(divisors) for _ in sources)


def find_divisors(weight_OI: NDArray[Any], group_size: int, statistics: Statistics, bits: int = 4) -> NDArray[Any]:
    """The channel scales that leave the least output error, as the diagonal of X^T X knows it: float32 [I].

    They are reciprocals of bfloat16 numbers, since a chip multiplies the input. Weights of one input are scaled alike.

    Raises:
        SchemeError: no scales leave a finite error.
    """
    import numpy as np

    from fluxkiln.quantize.pack import bf16_to_float32, dequantize, to_bf16_bits

    wide = weight_OI.astype(np.float32)
    importance = statistics.diagonal
    peaks = np.maximum(statistics.peaks, max(float(statistics.peaks.max()) * 1e-4, 1e-12))
    best, found = np.inf, None
    for exponent in _EXPONENTS:
        scales = peaks**exponent
        scales /= np.sqrt(scales.max() * scales.min())
        divisors: NDArray[Any] = np.reciprocal(bf16_to_float32(to_bf16_bits(1 / scales)))
        error = dequantize(SideTensors(divisors).pack(wide, group_size, bits), group_size)
        error /= divisors
        error -= wide
        # in float64 and without BLAS: the choice must not depend on the order of a sum
        lost = float(np.sum(np.einsum("oi,oi->i", error, error, dtype=np.float64) * importance))
        if lost < best:
            best, found = lost, divisors
    if found is None:
        raise SchemeError("no channel scale leaves a finite error: the weight or its calibration is not finite")
    return found


METHOD = Method(ls.rounder, calibrated=True, roles=(RECIPROCALS,), side_tensors=side_tensors)
