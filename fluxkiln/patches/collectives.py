"""What the ranks of a tensor-parallel part say to one another, and two ways to run it on one machine.

A part is written against `Collectives` and knows neither its rank nor who carries the tensors: nobody for one rank
(`OneRank`), threads of this process (`ThreadRanks`), or the operators of a compiler's frontend.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fluxkiln.errors import UsageError

Result = TypeVar("Result")

_END = "the end of the part"


class Collectives(Protocol):
    """Operations in which all ranks of a part take part, in the same order on each."""

    @property
    def ranks(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of `x`, which has one shape on all of them."""

    def all_gather(self, x: Tensor) -> Tensor:
        """`x` of every rank: [...] -> [ranks, ...], stacked in rank order on a new first axis."""


class OneRank:
    """A single rank: what it has is already the sum and the whole."""

    ranks = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] -> [1, ...]."""
        return x.unsqueeze(0)


class ThreadRanks:
    """Virtual ranks in threads of this process that meet at a barrier; see `run`.

    Sums are taken in rank order and in the tensors' own dtype, once, so that all ranks get the same bits.

    Attributes:
        counts: collectives so far, by name: `all_reduce`, `all_gather`. One in which all ranks meet counts once.
    """

    def __init__(self, ranks: int) -> None:
        if ranks < 1:
            raise UsageError(f"{ranks} ranks: there must be one at least")
        self.ranks = ranks
        self.counts: Counter[str] = Counter()
        self._place = threading.local()
        self._barrier = threading.Barrier(ranks)
        self._brought: list[tuple[str, Tensor | None]] = []
        self._met: Tensor | None = None

    def run(self, ranks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Call `ranks[r]` as rank r, all at once and without gradients; what they return, in rank order.

        Raises:
            UsageError: there are more or fewer functions than ranks, or the ranks do not issue the same collectives
                with the same shapes in the same order. Otherwise the first error of a rank; it ends the others.
        """
        if len(ranks) != self.ranks:
            raise UsageError(f"{len(ranks)} functions for {self.ranks} ranks: each rank runs one")
        results: list[list[Result]] = [[] for _ in ranks]
        errors: list[BaseException] = []
        self._brought = [("", None)] * self.ranks
        self._barrier = threading.Barrier(self.ranks, action=self._join)

        def work(rank: int) -> None:
            self._place.rank = rank
            try:
                with torch.no_grad():
                    results[rank].append(ranks[rank]())
                self._meet(_END, None)
            except threading.BrokenBarrierError:
                pass  # another rank's error ended this one
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [result[0] for result in results]

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives`; to be called by a rank of `run`."""
        return self._meet("all_reduce", x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives`; to be called by a rank of `run`."""
        return self._meet("all_gather", x)

    def _meet(self, name: str, x: Tensor | None) -> Tensor:
        rank = getattr(self._place, "rank", None)
        if rank is None:
            raise UsageError(f"{name} outside of a rank: call it within ThreadRanks.run")
        self._brought[rank] = name, x
        self._barrier.wait()
        # the next meeting needs this rank, so nothing is overwritten before it was read here
        met = self._met
        return torch.empty(0) if met is None else met

    def _join(self) -> None:
        """What the last rank to arrive does for all."""
        calls = [(name, None if x is None else (tuple(x.shape), x.dtype)) for name, x in self._brought]
        for rank, call in enumerate(calls):
            if call != calls[0]:
                raise UsageError(
                    f"rank 0 is at {calls[0]}, rank {rank} at {call}: all ranks issue the same collectives with the "
                    "same shapes in the same order"
                )
        name, tensors = calls[0][0], [x for _, x in self._brought if x is not None]
        self._met = None
        if name == _END:
            return
        self.counts[name] += 1
        if name == "all_gather":
            self._met = torch.stack(tensors)
            return
        total = tensors[0]
        for x in tensors[1:]:
            total = total + x
        self._met = total
