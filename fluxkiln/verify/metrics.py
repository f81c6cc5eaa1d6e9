"""How far one array is from another: pure functions, float64 throughout.

A comparison that contains NaN or infinity anywhere yields NaN in every number and `finite = False`; since no
comparison with NaN is true, such a result passes no gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import ParityError

# Elements converted to float64 at a time: three such pieces and their difference stay within 32 MB.
_CHUNK = 1 << 20
# Significant bits of BF16, F16 and F32.
_PRECISIONS = (8, 11, 24)
# Of the root mean square of what a block adds. Two roundings err by 0.4 of a step, so by a tenth of it where an element
# counts half; and by no more than a tenth in the weighted norm of any channel, half of what its gate grants.
HALF_WEIGHT = 0.25

AnyArray = NDArray[np.generic]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Metrics:
    """The distance of an actual array from the expected one.

    cosine: of the two arrays as flat vectors; 1 when both are zero, 0 when only one is.
    relative_l2: ||actual - expected|| / ||expected||; infinite when only `expected` is zero.
    max_abs: the largest |actual - expected|. It is the same number for the delta, so it is there once.
    worst_channel: over the channels (last axis), the largest error norm divided by the root mean square of the
        channels' expected norms (of the delta, weighted, when there is a base). One wrong scale or one bias put in the
        wrong place moves a single channel, which the norms over the whole array dilute.
    delta_cosine: of actual - base and expected - base, weighted by how finely the stream is stored, see `_weights`;
        None without a base.
    delta_relative_l2: ||actual - expected|| / ||expected - base||, every element alike; None without a base.
    psnr (dB), ssim: of images only, None otherwise.
    noise_ratio: of a comparison with the rung before: how far the array is from the reference, divided by how far that
        rung is; what a step adds to the noise that a dtype brings along. None in a comparison with the reference.
    delta_weight: the mean of those weights; 1 where every element was stored finely enough to tell of its delta.
    """

    cosine: float
    relative_l2: float
    max_abs: float
    worst_channel: float
    finite: bool
    delta_cosine: float | None = None
    delta_relative_l2: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    noise_ratio: float | None = None
    delta_weight: float | None = None


def explain_mismatch(actual: AnyArray, expected: AnyArray, base: AnyArray | None = None) -> str | None:
    """The sentence that says why these arrays cannot be compared, or None when they can."""
    if actual.shape != expected.shape:
        return (
            f"actual has shape {actual.shape}, expected has {expected.shape}: parity compares arrays of one shape; "
            "undo padding and layout changes before the comparison"
        )
    if base is not None and base.shape != expected.shape:
        return (
            f"the residual input has shape {base.shape}, expected has {expected.shape}: "
            "a delta needs the input that this output updates"
        )
    if expected.size == 0:
        return f"shape {expected.shape} holds no element: an empty comparison proves nothing"
    return None


def compare(actual: AnyArray, expected: AnyArray, base: AnyArray | None = None) -> Metrics:
    """Compare an output with the expected one, and what both add to the residual input `base`.

    Args:
        actual, expected: any shape, any real dtype; memory-mapped arrays are read piece by piece, twice with a base.
        base: the residual input both outputs update, of the same shape, or None.

    Raises ParityError: the shapes differ or the arrays are empty; the message names both shapes.
    """
    mismatch = explain_mismatch(actual, expected, base)
    if mismatch:
        raise ParityError(mismatch)
    channels = expected.shape[-1] if expected.ndim else 1
    whole, delta, weighted = np.zeros(4), np.zeros(4), np.zeros(4)
    error_C, size_C = np.zeros(channels), np.zeros(channels)
    max_abs = weight = 0.0
    scale = None if base is None else _storage(actual, expected, base)
    with np.errstate(invalid="ignore", over="ignore"):
        for a, e, b in _chunks(actual, expected, base, channels):
            difference = a - e
            whole += _products(a, e, difference)
            max_abs = max(max_abs, float(np.abs(difference).max()))
            if b is not None and scale is not None:
                root = np.sqrt(_weights(e, *scale))
                weight += float(np.square(root).sum())
                a, e = a - b, e - b
                delta += _products(a, e, difference)
                a, e, difference = root * a, root * e, root * difference
                weighted += _products(a, e, difference)
            error_C += np.square(difference).sum(axis=0)
            size_C += np.square(e).sum(axis=0)
    # A NaN or infinity in any element makes one of the sums of squares NaN or infinite.
    if not (np.isfinite(whole).all() and np.isfinite(delta).all() and np.isfinite(weighted).all()):
        return failed_metrics(has_delta=base is not None)
    return Metrics(
        cosine=_cosine(whole),
        relative_l2=_ratio(*np.sqrt(whole[2:])),
        max_abs=max_abs,
        worst_channel=_ratio(math.sqrt(error_C.max()), math.sqrt(size_C.mean())),
        finite=True,
        delta_cosine=None if base is None else _cosine(weighted),
        delta_relative_l2=None if base is None else _ratio(*np.sqrt(delta[2:])),
        delta_weight=None if base is None else weight / expected.size,
    )


def compare_images(actual: AnyArray, expected: AnyArray) -> Metrics:
    """Compare two images, with PSNR and SSIM besides the metrics of `compare`.

    Args:
        actual, expected: [height, width, channels], both uint8 in 0..255 or both float in 0..1, at least 7 x 7.

    Raises ParityError: shapes or value ranges differ, or the image is too small for SSIM's 7 x 7 window.
    """
    from skimage.metrics import structural_similarity

    metrics = compare(actual, expected)
    if expected.ndim != 3 or min(expected.shape[:2]) < 7:
        raise ParityError(f"an image of shape {expected.shape}: SSIM needs [height, width, channels], at least 7 x 7")
    if (actual.dtype == np.uint8) != (expected.dtype == np.uint8):
        raise ParityError(
            f"images of dtypes {actual.dtype} and {expected.dtype}: one counts to 255, the other to 1; "
            "give both as uint8 or both as float in 0..1"
        )
    if not metrics.finite:
        return failed_metrics(has_delta=False, is_image=True)
    peak = 255.0 if expected.dtype == np.uint8 else 1.0
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    mean_square = float(np.square(a - e).mean())
    return replace(
        metrics,
        # scikit-image's own PSNR divides by zero for identical images.
        psnr=math.inf if mean_square == 0.0 else 10.0 * math.log10(peak**2 / mean_square),
        ssim=float(structural_similarity(e, a, data_range=peak, channel_axis=-1)),
    )


def gain_of(difference: AnyArray) -> int:
    """What to multiply a difference of pictures by to see it.

    Args:
        difference: of 8-bit pictures, 0 to 255, any shape.

    Returns:
        The power of two at which all but the largest half percent of it fits into 8 bits; 1 when there is none.
    """
    shown = difference.astype(np.float32)
    high = float(np.percentile(shown, 99.5)) or float(shown.max())
    return int(2 ** max(0, math.floor(math.log2(255.0 / high)))) if high else 1


def failed_metrics(has_delta: bool, is_image: bool = False) -> Metrics:
    """The metrics of a comparison that could not be made: NaN everywhere, passes no gate."""
    delta, image = (math.nan if has_delta else None), (math.nan if is_image else None)
    return Metrics(math.nan, math.nan, math.nan, math.nan, False, delta, delta, image, image, None, delta)


def _products(actual: FloatArray, expected: FloatArray, difference: FloatArray) -> FloatArray:
    """Of pieces: actual with expected, and each of the three with itself; the error's before the size's."""
    pairs = ((actual, expected), (actual, actual), (difference, difference), (expected, expected))
    return np.array([np.vdot(*pair) for pair in pairs])


def _storage(actual: AnyArray, expected: AnyArray, base: AnyArray) -> tuple[int, float]:
    """Significant bits of the format that the values of `actual` fit, and the step of a stream that counts half."""
    used, delta, channels = 0, 0.0, expected.shape[-1] if expected.ndim else 1
    with np.errstate(invalid="ignore", over="ignore"):
        for a, e, b in _chunks(actual, expected, base, channels):
            used |= int(np.bitwise_or.reduce(a.astype(np.float32).view(np.uint32), axis=None))
            delta += float(np.square(e - (e if b is None else b)).sum())
    bits = next(bits for bits in _PRECISIONS if used % (1 << (24 - bits)) == 0)
    return bits, HALF_WEIGHT * math.sqrt(delta / expected.size)


def _weights(e_RC: FloatArray, bits: int, half: float) -> FloatArray:
    """How much elements of a residual stream can tell of what a block adds to them: 1 / (1 + (step / half)^2).

    Trained transformers have a few massive channels. Two neighbouring numbers of BF16 may be further apart there than
    all that the block adds, so what is found there is the format's rounding, of which the block's arithmetic has no
    part. The weights follow from the expected values alone: no result can weigh itself.

    Args:
        e_RC: a piece of the expected stream. bits: of the format it is stored in. half: the step that counts half.
    """
    step_RC = np.where(e_RC == 0.0, 0.0, np.ldexp(1.0, np.frexp(e_RC)[1] - bits))
    return np.asarray(1.0 / (1.0 + np.square(step_RC / half)) if half > 0.0 else np.ones_like(e_RC))


def _cosine(sums: FloatArray) -> float:
    dot, actual, _, expected = map(float, sums)
    if actual == 0.0 or expected == 0.0:
        return 1.0 if actual == expected else 0.0
    return max(-1.0, min(1.0, dot / (math.sqrt(actual) * math.sqrt(expected))))


def _ratio(error: float, size: float) -> float:
    if size > 0.0:
        return float(error / size)
    return 0.0 if error == 0.0 else math.inf


def _chunks(
    actual: AnyArray, expected: AnyArray, base: AnyArray | None, channels: int
) -> Iterator[tuple[FloatArray, FloatArray, FloatArray | None]]:
    """Pieces of the arrays as float64 [rows, channels]."""
    actual_RC, expected_RC = actual.reshape(-1, channels), expected.reshape(-1, channels)
    base_RC = None if base is None else base.reshape(-1, channels)
    step = max(1, _CHUNK // channels)
    for start in range(0, len(expected_RC), step):
        piece = slice(start, start + step)
        base_piece = None if base_RC is None else base_RC[piece].astype(np.float64)
        yield actual_RC[piece].astype(np.float64), expected_RC[piece].astype(np.float64), base_piece
