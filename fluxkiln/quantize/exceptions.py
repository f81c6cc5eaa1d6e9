"""What is stored otherwise than the rest, as text: `PLACE=SCHEME`, for builds and layer by layer alike.

A place is a kind of part (`head`), some weights of one by a shell pattern (`single.proj_out`), or, where every layer
may have a scheme of its own, a pattern on names of layers. Weights that a scheme leaves in its own arithmetic are in
its name: `W4BF16-bf16:proj_out+attn.*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from fluxkiln.errors import SchemeError

_KEPT = "bf16:"
_PATTERN = re.compile(r"[\w.*?\[\]!]+")


def parse_exception(text: str, places: str) -> tuple[str, str]:
    """`single.proj_out=BF16` -> place and scheme.

    Args:
        places: what may be one, for the error.
    """
    place, sign, scheme = (piece.strip() for piece in text.partition("="))
    if not sign or not place:
        raise SchemeError(f"exception {text!r} is not PLACE=SCHEME; a place is {places}")
    return place, scheme


def with_exceptions(scheme: str, places: Iterable[str], other: str) -> str:
    """`W4BF16,single.proj_out=BF16`: what a build takes, with all these places in another scheme."""
    return ",".join([scheme, *(f"{place}={other}" for place in places)])


def parse_kept(piece: str) -> tuple[str, ...] | None:
    """`bf16:proj_out+attn.*`, a piece of a scheme's name -> its patterns; None for any other piece."""
    return tuple(piece[len(_KEPT) :].split("+")) if piece.lower().startswith(_KEPT) else None


def kept_text(patterns: tuple[str, ...]) -> str:
    """The piece of a scheme's name that `parse_kept` reads."""
    return _KEPT + "+".join(patterns)


def check_pattern(pattern: str) -> None:
    """Raise SchemeError unless all of it may be in a pattern."""
    if not _PATTERN.fullmatch(pattern):
        raise SchemeError(f"{pattern!r} is no pattern of weights; letters, digits and _ . * ? [ ] ! may be in it")


def weight_name(slot: str) -> str:
    """A slot by the checkpoint's name, without `.weight` and what a template does to it (`__s1.0.3072__t`)."""
    return slot.split("__")[0].removesuffix(".weight")


def matches(pattern: str, slot: str) -> bool:
    """Whether a pattern is for a weight: with its name with or without `.weight`."""
    return any(fnmatchcase(name, pattern) for name in (slot.split("__")[0], weight_name(slot)))
