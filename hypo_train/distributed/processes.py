"""The processes of a run, one a device: which part of the work is whose, and what the hosts tell each other.

What training itself exchanges (gradients, sharded weights) is accelerate's. Hosts agree through a group of their own,
on CPU tensors, so that no accelerator is waited for.
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
# A main process writes checkpoints and keeps reference log-probs while the others wait.
_PATIENCE = timedelta(hours=6)
_FAILURE = "hypo_train/failure"


class Processes:
    """The processes of a run; alone, a process is its own main process and waits for nobody.

    Every method is called by all processes, in the same order.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank_share = RankShare(dist.get_rank(), dist.get_world_size()) if distributed else SINGLE_PROCESS
        self._hosts: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.count > 1 else None

    @property
    def count(self) -> int:
        return self.rank_share.world_size

    @property
    def is_main(self) -> bool:
        return self.rank_share.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, which can be pickled, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._hosts)
        return values

    def turns(self, pieces: Sequence[T], *, alike: bool) -> list[tuple[T, bool]]:
        """This process's pieces, and whether each counts.

        ``alike``: every process has as many, where they make passes together; the last piece, which does not count,
        fills up those that have fewer.
        """
        mine = [(piece, True) for piece in self.rank_share.select(pieces)]
        wanted = -(-len(pieces) // self.count) if alike else 0
        return mine + [(pieces[-1], False)] * (wanted - len(mine))

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._hosts)
        return int(found)

    def joined(self, part: Tensor) -> Tensor | None:
        """The processes' CPU tensors of one shape, one behind the other, on the main process; None on the others."""
        if self.count == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.count)] if self.is_main else None
        dist.gather(part, parts, dst=0, group=self._hosts)
        return None if parts is None else torch.cat(parts)

    def on_main(self, function: Callable[[], T]) -> T:
        """What ``function`` gives on the main process, for all of them, which wait for it.

        Raises:
            OtherProcessError: on the others, where it has raised on the main process.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as raised:
                error = raised
                outcome[1] = self._told(raised)
        dist.broadcast_object_list(outcome, src=0, group=self._hosts)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise OtherProcessError(outcome[1])
        return cast(T, outcome[0])

    def together(self, function: Callable[[], T]) -> T:
        """What ``function`` gives here, if it raises nowhere.

        Raises:
            OtherProcessError: where it has raised on another process, the first of which raises its error itself.
        """
        if self.count == 1:
            return function()
        error: Exception | None = None
        result: Any = None
        try:
            result = function()
        except Exception as raised:
            error = raised
        everyones = self.gather(None if error is None else self._told(error))
        failed = [rank for rank, told in enumerate(everyones) if told is not None]
        if error is not None and self.rank_share.rank == failed[0]:
            raise error
        if failed:  # what all have found is said once; what one has found, where its own machine's words are not read
            raise OtherProcessError(everyones[failed[0]] if error is None else f"process {failed[0]} has failed")
        return cast(T, result)

    def _told(self, error: Exception) -> str:
        """An error of this process, as the others tell of it."""
        return f"process {self.rank_share.rank}: {type(error).__name__}: {error}"

    @contextmanager
    def telling_failures(self) -> Iterator[None]:
        """In the ``with`` block, the first process that fails tells the others why, for them to say so in the place of
        the broken connections that they find.

        Raises:
            OtherProcessError: in the place of an error that another process's has brought about.
        """
        try:
            yield
        except Exception as error:
            if self.count == 1 or isinstance(error, (Stopped, OtherProcessError)):
                raise
            own = self._told(error)
            if (first := _first_failure(own)) != own and isinstance(error, RuntimeError):
                raise OtherProcessError(first) from error
            raise


def _first_failure(own: str) -> str:
    """What the first process that failed has left for the others where all can read it; ``own``, if none has."""
    try:
        return dist.distributed_c10d._get_default_store().compare_set(_FAILURE, "", own).decode()
    except RuntimeError:  # the store has gone with the process that kept it
        return own
