"""Methods of quantization, one file each: a file here is a method of that name, and has a `METHOD`.

Files are read when a method is asked for; what they need to compute is imported inside their functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.side_tensors import RECIPROCALS, SideTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.quantize.calibration import Statistics
    from fluxkiln.quantize.pack import Rounder


@dataclass(frozen=True, slots=True)
class Source:
    """A weight whose side tensors are asked for.

    Attributes:
        read: the whole of it, [O, I]; called once.
        statistics: of its inputs, where they are known.
    """

    read: Callable[[], NDArray[Any]]
    statistics: Statistics | None = None


# weights that have one input in common, group size, bits, rank, rows of all of them together to choose by (0: all rows)
# -> the side tensors of each
SideSearch = Callable[[Sequence[Source], int, int, int, int], Iterator[SideTensors]]


@dataclass(frozen=True, slots=True)
class Method:
    """How codes, scales and zero points are found.

    Attributes:
        rounder: statistics of a matrix's inputs, and whether all zero points are the middle level -> what packs its
            rows. Of a method with side tensors: what packs the rest that these leave.
        calibrated: from statistics of the inputs as well.
        symmetric: zero points may all be held in the middle.
        as_compiler: a compiler that is given the weights stores the same codes.
        roles: what stands beside the codes, of `side_tensors`. Methods without any need codes alone and share a mould;
            each of the others changes the graph, and has moulds of its own.
        default_rank: of the branch beside the codes; 0 without one.
        side_tensors: finds what stands beside the codes, where something does.
    """

    rounder: Callable[[Statistics | None, bool], Rounder]
    calibrated: bool = False
    symmetric: bool = False
    as_compiler: bool = False
    roles: tuple[str, ...] = ()
    default_rank: int = 0
    side_tensors: SideSearch | None = None

    @property
    def of_input(self) -> bool:
        """Whether what stands beside the codes is the input's: all weights that read it have the same."""
        return self.roles == (RECIPROCALS,)


@cache
def method_names() -> tuple[str, ...]:
    """All methods, by the names of the files here."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@cache
def find_method(name: str) -> Method:
    """The method called `name`; SchemeError with the legal names otherwise."""
    if name not in method_names():
        raise SchemeError(f"no method is called {name!r}; there are {', '.join(method_names())}")
    method: Method = importlib.import_module(f"{__name__}.{name}").METHOD
    return method
