"""Schemes as data: how the weights of a part are stored and what its arithmetic runs in.

What is stored otherwise than the rest is said as text, `PLACE=SCHEME`, for builds and layer by layer alike. A place is
a kind of part (`head`), some weights of one by a shell pattern (`single.proj_out`), or, where every layer may have a
scheme of its own, a pattern on names of layers. Weights that a scheme leaves in its own arithmetic are in its name:
`W4BF16-bf16:proj_out+attn.*`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.formats import FILE_FORMATS
from fluxkiln.quantize.methods import Method, Source, find_method, method_names
from fluxkiln.quantize.side_tensors import SideTensors, side_shape, split_slot
from fluxkiln.quantize.smoothing import METHOD as SMOOTHING
from fluxkiln.types import Kind, Part

Arithmetic = Literal["F32", "F16", "BF16"]
# what a scheme without a method means: of the methods without calibration the one that leaves least, where that shows
DEFAULT_METHODS: Mapping[int, str] = {0: "rtn", 4: "ls", 8: "rtn"}
_NO_METHOD = DEFAULT_METHODS[0]  # also of what has a way of its own to find codes
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
_KEPT, _SCORES, DEFAULT_LIMIT = "bf16:", "qk", 6
_BLOCKS = re.compile(r"(?P<family>\w+)\.(?P<first>\d+)(-(?P<last>\d+))?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one part is stored and computed.

    Attributes:
        arithmetic: what activations are computed in, and what unquantized weights are stored in.
        weight_bits: 4, 8, or 0 for weights that are not quantized.
        group_size: input channels that share a scale; 0 without quantization. The compiler's 8 bits have groups too.
        method: how the codes are found, a file of `fluxkiln.quantize.methods`. A mould depends on it only where it
            needs more than codes.
        symmetric: all zero points are the middle level.
        rank: of the branch beside the codes; 0 for methods without one.
        kept: shell patterns on the names of weights that are not quantized, each once and sorted; see `keeps`.
        form: of `quantize.formats`, which then says bits and group size; empty for codes, scales and zero points as
            compilers take them.
        integer: a matmul's inputs are rounded to 8 bits as well, see `quantize.integer`; a scale a row of the weight.
        limit: of queries and keys whose products are in integers too, see `smoothing.balance`; 0: they are not.
    """

    arithmetic: Arithmetic
    weight_bits: int = 0
    group_size: int = 0
    method: str = _NO_METHOD
    symmetric: bool = False
    rank: int = 0
    kept: tuple[str, ...] = ()
    form: str = ""
    integer: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        if self.form or self.integer:
            if self.method != _NO_METHOD or self.symmetric:
                left_out = "sym" if self.symmetric else self.method
                raise SchemeError(f"{self._format} has a way of its own to find codes; leave {left_out} out")
        elif self.weight_bits not in (0, 4, 8):
            raise SchemeError(f"{self.weight_bits}-bit weights: 4, 8 and unquantized are supported")
        elif self.weight_bits and self.group_size not in GROUP_SIZES:
            raise SchemeError(f"group size {self.group_size}: {', '.join(map(str, GROUP_SIZES))} are supported")
        method = find_method(self.method)
        if bool(self.rank) != bool(method.default_rank) or self.rank < 0:
            able = ", ".join(name for name in method_names() if find_method(name).default_rank)
            raise SchemeError(
                f"rank {self.rank} of method {self.method}: {able} has one of at least 1, no other has one"
            )
        if self.symmetric and not method.symmetric:
            able = ", ".join(name for name in method_names() if find_method(name).symmetric)
            raise SchemeError(f"method {self.method} has no symmetric form; {able} have one")
        object.__setattr__(self, "kept", tuple(sorted(set(self.kept))))
        if self.kept and not self.weight_bits:
            raise SchemeError(
                f"{self.arithmetic} does not quantize, so no weight ({self.kept[0]}) can be left out of it"
            )
        for pattern in self.kept:
            if not re.fullmatch(r"[\w.*?\[\]!]+", pattern):
                raise SchemeError(
                    f"{pattern!r} is no pattern of weights; letters, digits and _ . * ? [ ] ! may be in it"
                )

    def keeps(self, slot: str) -> bool:
        """Whether a slot stays in the scheme's arithmetic though the others of its part are quantized."""
        return any(matches(pattern, slot) for pattern in self.kept)

    def in_codes(self, slot: str) -> bool:
        """Whether a matmul's weight is to be quantized."""
        return bool(self.weight_bits) and not split_slot(slot)[1] and not self.keeps(slot)

    @property
    def how(self) -> Method:
        """The method by its name."""
        return SMOOTHING if self.integer else find_method(self.method)

    def find_beside(self, sources: Sequence[Source], most_rows: int = 0) -> Iterator[SideTensors]:
        """What stands beside the codes of weights that have one input in common, in their order.

        Args:
            most_rows: of all of them together that the choice may be made by; 0 for all.
        """
        search = self.how.side_tensors
        return search(sources, self.group_size, self.weight_bits, self.rank, most_rows) if search else iter(())

    @property
    def calibrated(self) -> bool:
        """Whether its codes are made from statistics of the inputs as well."""
        return bool(self.weight_bits) and self.how.calibrated

    def side_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Role -> shape of what stands beside the codes of a weight [O, I], in torch's layout, bfloat16."""
        return {role: side_shape(role, shape, self.rank) for role in (self.how.roles if self.weight_bits else ())}

    @property
    def name(self) -> str:
        """As it is asked for; without the method where that is the default."""
        if not self.weight_bits:
            return self.arithmetic
        default = _NO_METHOD if self.form or self.integer else DEFAULT_METHODS[self.weight_bits]
        method = "" if self.method == default else f"-{self.method}"
        return f"{self._format}{method}{self._rank}{'-sym' * self.symmetric}{self._kept}"

    @property
    def compiled_name(self) -> str:
        """What a compiler has to know of it: methods of codes alone share one mould, format and places are the same."""
        if not self.weight_bits:
            return self.arithmetic
        method = "" if self.codes_only or self.integer else f"-{self.method}{self._rank}"
        return f"{self._format}{method}{self._kept}"

    @property
    def base_name(self) -> str:
        """Bits and arithmetic alone: `W4BF16`."""
        return self.name.split("-")[0]

    @property
    def bytes_per_weight(self) -> float:
        """Codes, a bfloat16 scale and an 8-bit zero point a group; those of the form; or numbers of 2 or 4 bytes."""
        if self.form:
            return FILE_FORMATS[self.form].bytes_per_weight
        if self.integer:
            return 1.0
        if self.weight_bits:
            return self.weight_bits / 8 + 3 / self.group_size
        return 4.0 if self.arithmetic == "F32" else 2.0

    @property
    def codes_only(self) -> bool:
        """Whether weights are stored as codes and nothing beside them, or not quantized."""
        return not self.weight_bits or not self.how.roles

    @property
    def _format(self) -> str:
        if self.form:
            return self.form
        if self.integer:
            return "W8A8" + (f"-{_SCORES}{self.limit if self.limit != DEFAULT_LIMIT else ''}" if self.limit else "")
        group = "" if self.group_size in (0, DEFAULT_GROUP_SIZE) else f"-g{self.group_size}"
        return f"W{self.weight_bits}{self.arithmetic}{group}"

    @property
    def _rank(self) -> str:
        return "" if self.rank == self.how.default_rank else f"-r{self.rank}"

    @property
    def _kept(self) -> str:
        return f"-{_KEPT}{'+'.join(self.kept)}" if self.kept else ""

    @property
    def rounds_as_compiler(self) -> bool:
        """Whether the compiler itself, given the weights, would store the same codes."""
        return not self.weight_bits or self.how.as_compiler


_NAMED: Mapping[str, Scheme] = {
    "F32": Scheme("F32"),
    "F16": Scheme("F16"),
    "BF16": Scheme("BF16"),
    "W8BF16": Scheme("BF16", 8, DEFAULT_GROUP_SIZE, DEFAULT_METHODS[8]),
    "W4BF16": Scheme("BF16", 4, DEFAULT_GROUP_SIZE, DEFAULT_METHODS[4]),
    "W8A8": Scheme("BF16", 8, integer=True),
    # what a format does not quantize is stored as beside the compilers' codes
    **{name: Scheme("BF16", one.bits, one.group, form=name) for name, one in FILE_FORMATS.items()},
}
SCHEME_NAMES = (
    *(name for name in _NAMED if name not in FILE_FORMATS), f"W8A8-{_SCORES}",
    *(f"W4BF16-g{size}" for size in GROUP_SIZES if size != DEFAULT_GROUP_SIZE),
)  # fmt: skip
_LEGAL = (
    f"there are {', '.join(SCHEME_NAMES)}; quantized ones may name a method: -{', -'.join(method_names())}; and, in "
    f"files of that format, {', '.join(FILE_FORMATS)}"
)


def parse_scheme(text: str) -> Scheme:
    """`W4BF16-g128-mse-sym`, any scheme's `name` -> Scheme; SchemeError with the legal names otherwise."""
    base, *pieces = text.strip().split("-")
    scheme = _NAMED.get(base.upper())
    if scheme is None:
        raise SchemeError(f"no scheme is called {text!r}; {_LEGAL}")
    chosen: dict[str, Any] = {}
    value: int | str | bool | tuple[str, ...]
    for written in pieces:
        piece = written.lower()
        if piece.startswith(_KEPT):
            key, value = "kept", tuple(written[len(_KEPT) :].split("+"))
        elif re.fullmatch(r"g\d+", piece):
            key, value = "group_size", int(piece[1:])
            if scheme.weight_bits != 4:
                raise SchemeError(f"scheme {text!r}: only W4BF16 has groups; {_LEGAL}")
        elif scheme.integer and (limit := re.fullmatch(rf"{_SCORES}([1-9]\d*)?", piece)):
            key, value = "limit", int(limit[1] or DEFAULT_LIMIT)
        elif re.fullmatch(r"r\d+", piece):
            key, value = "rank", int(piece[1:])
        elif piece in method_names() or piece == "sym":
            key, value = ("symmetric", True) if piece == "sym" else ("method", piece)
            if not scheme.weight_bits:
                raise SchemeError(f"scheme {text!r}: {base} does not quantize, so it has no methods; {_LEGAL}")
        else:
            raise SchemeError(f"no scheme is called {text!r}; {_LEGAL}")
        if key in chosen:
            raise SchemeError(f"scheme {text!r} says two things about its {key.replace('_', ' ')}; keep one")
        chosen[key] = value
    rank = find_method(chosen.get("method", scheme.method)).default_rank
    return replace(scheme, **{"rank": rank, **chosen})


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


def weight_name(slot: str) -> str:
    """A slot by the checkpoint's name, without `.weight` and what a template does to it (`__s1.0.3072__t`)."""
    return slot.split("__")[0].removesuffix(".weight")


def matches(pattern: str, slot: str) -> bool:
    """Whether a pattern is for a weight: with its name with or without `.weight`."""
    return any(fnmatchcase(name, pattern) for name in (slot.split("__")[0], weight_name(slot)))


def form_group(kinds: Mapping[str, Kind], kind: str) -> tuple[str, ...]:
    """All kinds that have weights of the block that a kind is of, in either form."""
    return tuple(one.name for one in kinds.values() if one.block == kinds[kind].block)


def part_schemes(
    blocks: Scheme, kinds: Mapping[str, Kind], others: Scheme | None = None, legal: Sequence[str] = ()
) -> dict[str, Scheme]:
    """The scheme of every kind when the blocks are to be stored as `blocks`.

    An integer scheme is for the transformer's blocks alone; what else carries weight is then stored as `others`.

    The repeated blocks and their hoisted modulation carry the weight and take `blocks`, so that both forms of the
    transformer compute the same. What exists once stays unquantized: it is small, and errors there (the time embedding
    above all) reach every block. The VAE takes F16: through its 25 convolutions BF16 leaves 1.0e-2, in the compiler as
    in eager PyTorch, F16 leaves 1.2e-3 (`docs/numerics.md`).
    """
    schemes = {}
    for name, kind in kinds.items():
        if blocks.arithmetic == "F32":
            schemes[name] = _NAMED["F32"]
        elif kind.overflows and blocks.arithmetic == "F16":
            schemes[name] = _NAMED["BF16"]
        elif kind.stored == "blocks":
            schemes[name] = others if others and blocks.integer and not kind.is_block else blocks
        else:
            stored = "F16" if blocks.arithmetic == "F16" else kind.stored
            schemes[name] = _NAMED[stored if stored in (legal or _NAMED) else blocks.arithmetic]
    return schemes


def parse_schemes(
    text: str | None, default: str, kinds: Mapping[str, Kind], legal: Sequence[str] = ()
) -> tuple[Scheme, dict[str, Scheme]]:
    """`W4BF16` or `W4BF16,vae_decoder=BF16`: the block scheme, and the scheme of every kind.

    An exception is for a family of kinds (a block in either form, the modulation) or one kind, and a later one
    overrides an earlier one; or for some weights of one, `single.proj_out=BF16`, with a shell pattern (`Scheme.keeps`),
    and then it is added to what was said before: those of a block's modulation are in the block. Those of single blocks
    are of `block_schemes`.

    Raises:
        SchemeError: a scheme or kind that does not exist.
    """
    head, *exceptions = (text or default).split(",")
    if "=" in head:
        head, exceptions = default, [head, *exceptions]
    blocks = parse_scheme(head)
    schemes = part_schemes(blocks, kinds, parse_scheme(default), legal)
    families: dict[str, tuple[str, ...]] = {}
    for one in kinds.values():
        families[one.family] = (*families.get(one.family, ()), one.name)
    places: set[str] = set()
    for exception in exceptions:
        place, name = parse_exception(exception, "a kind of part, KIND.PATTERN for some weights of one, or KIND.03-07")
        if place in places:
            raise SchemeError(f"scheme {text!r}: {place} is given twice; say once how it is stored")
        places.add(place)
        if _BLOCKS.fullmatch(place):
            continue  # see `block_schemes`
        kind, dot, pattern = place.partition(".")
        if kind not in schemes and kind not in families:
            known = ", ".join(dict.fromkeys([*schemes, *families]))
            raise SchemeError(f"scheme {text!r}: no kind of part is called {kind!r}; there are {known}")
        if dot:
            block = families.get(kind, (kind,))[0]
            group = form_group(kinds, block) if kind == kinds[block].block else families.get(kind, (kind,))
            quantized = [one for one in group if schemes[one].weight_bits]
            if not quantized:
                raise SchemeError(
                    f"scheme {text!r}: {kind} is not quantized, it is {schemes[group[0]].name} as a whole; leave it out"
                )
            arithmetic = schemes[quantized[0]].arithmetic
            if parse_scheme(name).name != arithmetic:
                raise SchemeError(
                    f"scheme {text!r}: {place} cannot be {name}: single weights of a quantized kind are {arithmetic} "
                    f"or as the others; write {place}={arithmetic}"
                )
            schemes |= {one: replace(schemes[one], kept=(*schemes[one].kept, pattern)) for one in quantized}
        else:
            found = parse_scheme(name)
            named = families.get(kind, (kind,))
            if found.integer and not all(kinds[one].is_block for one in named):
                able = ", ".join(dict.fromkeys(one.family for one in kinds.values() if one.is_block))
                raise SchemeError(
                    f"scheme {text!r}: {kind} cannot be {name}, whose inputs are rounded to 8 bits; {able} can"
                )
            schemes |= dict.fromkeys(named, found)
    return blocks, schemes


def block_schemes(text: str | None, parts: Iterable[Part]) -> dict[str, Scheme]:
    """`W8A8,double.00-03=W4BF16`: the schemes of single blocks among the parts, by their names.

    SchemeError: there is no such block, or it is given twice.
    """
    found: dict[str, Scheme] = {}
    blocks = [part for part in parts if part.traits.is_block]
    for exception in (text or "").split(","):
        place, _, name = (piece.strip() for piece in exception.partition("="))
        if not (numbers := _BLOCKS.fullmatch(place)):
            continue
        family, first, last = numbers["family"], int(numbers["first"]), int(numbers["last"] or numbers["first"])
        there = [part.name for part in blocks if part.name.partition(".")[0] == family]
        chosen = [one for one in there if first <= int(one.partition(".")[2]) <= last]
        if len(chosen) != last - first + 1 or not chosen:
            known = f"its blocks are {there[0]} to {there[-1]}" if there else f"there are no blocks called {family}"
            raise SchemeError(f"scheme {text!r}: {place} is not there; {known}")
        if twice := next((one for one in chosen if one in found), None):
            raise SchemeError(f"scheme {text!r}: {twice} is given twice; say once how it is stored")
        found |= dict.fromkeys(chosen, parse_scheme(name))
    return found


def check_groups(scheme: Scheme, slot: str, in_features: int) -> None:
    """Raise SchemeError when a weight's input width is no multiple of the group size."""
    if scheme.group_size and in_features % scheme.group_size:
        if scheme.form:
            legal_forms = [one.name for one in FILE_FORMATS.values() if in_features % one.group == 0]
            raise SchemeError(
                f"{scheme.form} stores {scheme.group_size} input channels together, which does not divide the "
                f"{in_features} of {slot}; use {' or '.join(legal_forms) or 'BF16'} for that kind of part, --scheme "
                f"{scheme.form},KIND={(*legal_forms, 'BF16')[0]}"
            )
        legal = [size for size in GROUP_SIZES if in_features % size == 0]
        remedy = f"use {' or '.join(replace(_NAMED['W4BF16'], group_size=size).name for size in legal) or 'BF16'}"
        raise SchemeError(
            f"group size {scheme.group_size} does not divide the {in_features} input channels of {slot}; {remedy}"
        )


def stored_size(shape: tuple[int, ...], scheme: Scheme) -> int:
    """Bytes of a matrix, with what stands beside its codes in bfloat16."""
    beside = 2 * sum(map(math.prod, scheme.side_shapes(shape).values()))
    return int(math.prod(shape) * scheme.bytes_per_weight) + beside
