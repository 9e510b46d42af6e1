"""The processes of a run, one for each device, and the communication between their hosts.

accelerate exchanges what training itself needs: gradients and sharded weights. Here, hosts use a
separate process group with CPU tensors, so that no process waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hypo_train.utils.errors import OtherProcessError, Stopped
from hypo_train.utils.rank_share import SINGLE_PROCESS, RankShare

T = TypeVar("T")
# The other processes wait while the main one writes checkpoints or stores reference log-probs.
_TIMEOUT = timedelta(hours=6)
_FAILURE_KEY = "hypo_train/failure"


class Processes:
    """The processes of a run. A single process is the main process and never waits.

    All processes call every method, in the same order.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank_share = RankShare(dist.get_rank(), dist.get_world_size()) if distributed else SINGLE_PROCESS
        self._group: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT) if self.world_size > 1 else None

    @property
    def world_size(self) -> int:
        return self.rank_share.world_size

    @property
    def is_main(self) -> bool:
        return self.rank_share.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every process, by rank. Values are pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def divide(self, items: Sequence[T], *, same_count: bool) -> list[tuple[T, bool]]:
        """Return this rank's items, each with whether it counts.

        Args:
            same_count: give every rank the same number of items, as passes of sharded weights need. The last item
                fills up; a filler does not count.
        """
        divided = [(item, True) for item in self.rank_share.select(items)]
        wanted = -(-len(items) // self.world_size) if same_count else 0
        return divided + [(items[-1], False)] * (wanted - len(divided))

    def max(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.world_size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return int(largest)

    def gather_on_main(self, part: Tensor) -> Tensor | None:
        """Concatenate the processes' CPU tensors, all of one shape, on the main process; None on the others."""
        if self.world_size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(part, parts, dst=0, group=self._group)
        return None if parts is None else torch.cat(parts)

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the main process and return its result on all of them, which wait for it.

        Raises:
            OtherProcessError: on the other processes, if ``function`` raised on the main one.
        """
        if self.world_size == 1:
            return function()
        result_and_failure: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                result_and_failure[0] = function()
            except Exception as raised:
                error = raised
                result_and_failure[1] = self._describe(raised)
        dist.broadcast_object_list(result_and_failure, src=0, group=self._group)
        if error is not None:
            raise error
        result, failure = result_and_failure
        if failure is not None:
            raise OtherProcessError(failure)
        return cast(T, result)

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every process and return this process's result.

        If it fails anywhere, all processes raise: the first that failed raises its own error, the others an
        ``OtherProcessError``.
        """
        if self.world_size == 1:
            return function()
        error: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        failures = self.gather(None if error is None else self._describe(error))
        failed = [rank for rank, failure in enumerate(failures) if failure is not None]
        if error is not None and self.rank_share.rank == failed[0]:
            raise error
        if failed:  # an error that several processes have is printed once, by the first of them
            raise OtherProcessError(failures[failed[0]] if error is None else f"process {failed[0]} has failed")
        return cast(T, result)

    def _describe(self, error: Exception) -> str:
        return f"process {self.rank_share.rank}: {type(error).__name__}: {error}"

    @contextmanager
    def report_failures(self) -> Iterator[None]:
        """Tell the other processes why this one fails, so that they do not report a broken connection instead.

        Raises:
            OtherProcessError: in place of an error that follows from another process's.
        """
        try:
            yield
        except Exception as error:
            if self.world_size == 1 or isinstance(error, (Stopped, OtherProcessError)):
                raise
            failure = self._describe(error)
            if (first := _first_failure(failure)) != failure and isinstance(error, RuntimeError):
                raise OtherProcessError(first) from error
            raise


def _first_failure(failure: str) -> str:
    """Return the failure that a process has stored first: another one's, or this ``failure``."""
    try:
        return dist.distributed_c10d._get_default_store().compare_set(_FAILURE_KEY, "", failure).decode()
    except RuntimeError:  # the process that held the store has ended
        return failure
