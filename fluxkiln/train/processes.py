"""The processes that train together, as `torchrun` or `accelerate launch` started them; one where nobody did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

# How long a process waits for the others: while one paints a picture, say. One that ended is noticed at once.
MOST_WAIT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among `count`; `rank` 0 writes files and speaks. `device` is where it computes."""

    accelerator: Any

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> Any:
        return self.accelerator.device

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes, in all of them. ResourceError: one of them ended."""
        with _others_named():
            reduced: Tensor = self.accelerator.reduce(values, reduction="mean")
        return reduced

    def wait(self) -> None:
        """Until all are here. ResourceError: one of them ended."""
        with _others_named():
            self.accelerator.wait_for_everyone()


@contextmanager
def open_processes() -> Iterator[Processes]:
    """Join the other processes; gloo connects them on CPUs. ResourceError: they cannot be reached."""
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    with _others_named():
        # without cpu=True it leaves processes on CPUs apart
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=MOST_WAIT)])
    try:
        yield Processes(accelerator)
    finally:
        accelerator.end_training()


@contextmanager
def _others_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's, whose texts are of sockets
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise ResourceError(
            f"another process of this training ended or cannot be reached ({reason}); finished work is kept: start all "
            "processes again with the same command, and they go on"
        ) from error
