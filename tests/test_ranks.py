"""Virtual ranks meet, agree and end together."""

from __future__ import annotations

import pytest
import torch

from fluxkiln.errors import UsageError
from fluxkiln.patches.cut import Collectives, SilentRanks
from tests.ranks import ThreadRanks


def test_one_rank_has_the_sum_and_the_whole() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    alone: Collectives = SilentRanks(1)
    assert alone.ranks == 1
    assert alone.all_reduce(x) is x
    assert alone.all_gather(x).shape == (1, 2, 3)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_sum_and_gather_in_rank_order(ranks: int) -> None:
    group = ThreadRanks(ranks)

    def rank_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        summed = torch.zeros(3)
        for _ in range(20):
            summed = group.all_reduce(torch.full((3,), 0.1 * (rank + 1)))
        return summed, group.all_gather(torch.tensor([rank, -rank]))

    results = group.run([lambda rank=rank: rank_of(rank) for rank in range(ranks)])
    total = torch.zeros(3)
    for rank in range(ranks):
        total = total + torch.full((3,), 0.1 * (rank + 1)) if rank else torch.full((3,), 0.1)
    for summed, gathered in results:
        assert torch.equal(summed, total)
        assert torch.equal(gathered, torch.tensor([[rank, -rank] for rank in range(ranks)]))
    assert group.counts == {"all_reduce": 20, "all_gather": 1}


def test_the_error_of_one_rank_ends_all_and_is_the_one_that_is_raised() -> None:
    group = ThreadRanks(3)

    def fail() -> torch.Tensor:
        raise RuntimeError("rank 1 is out")

    def wait() -> torch.Tensor:
        return group.all_reduce(torch.ones(1))

    with pytest.raises(RuntimeError, match="rank 1 is out"):
        group.run([wait, fail, wait])
    # and the group can be used again
    assert group.run([wait, wait, wait])[2].item() == 3


def test_ranks_that_do_not_issue_the_same_collectives_are_refused() -> None:
    group = ThreadRanks(2)
    one = torch.ones(1)

    def reduce() -> torch.Tensor:
        return group.all_reduce(one)

    with pytest.raises(UsageError, match=r"rank 0 is at \('all_reduce'.*the end of the part"):
        group.run([reduce, lambda: one])
    with pytest.raises(UsageError, match="all_gather"):
        group.run([reduce, lambda: group.all_gather(one)])
    with pytest.raises(UsageError, match=r"\(2,\)"):
        group.run([reduce, lambda: group.all_reduce(torch.ones(2))])
    with pytest.raises(UsageError, match="3 functions for 2 ranks"):
        group.run([reduce, reduce, reduce])
    with pytest.raises(UsageError, match="outside of a rank"):
        group.all_reduce(one)
    with pytest.raises(UsageError, match="0 ranks"):
        ThreadRanks(0)
