"""Several transfers at once, of which the first failure ends all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from fluxkiln.artifacts.registry.transfer import Stop, StoppedError

_T = TypeVar("_T")

# More gain nothing on one connection's line, and each takes memory for its buffers.
TRANSFERS = 4


def each(items: Iterable[_T], work: Callable[[_T], None], stop: Stop, jobs: int) -> None:
    """`work` on every item, `jobs` at a time.

    Raises:
        what `work` raised first, once all transfers have ended.
    """
    with ThreadPoolExecutor(jobs, thread_name_prefix="transfer") as pool:
        pending: set[Future[None]] = {pool.submit(work, item) for item in items}
        try:
            done, pending = wait(pending, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.event.set()
            for future in pending:
                future.cancel()
            raise
        if failed := [future for future in done if future.exception() is not None]:
            stop.event.set()
            for future in pending:
                future.cancel()
            wait(pending)
            errors = [future.exception() for future in [*failed, *(f for f in pending if not f.cancelled())]]
            # Those that were told to stop know nothing.
            raise next(
                e for e in [*(e for e in errors if e is not None and not isinstance(e, StoppedError)), *errors] if e
            )
