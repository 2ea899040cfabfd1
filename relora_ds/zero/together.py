"""Run work that may fail on one rank: all ranks learn of a failure, and none waits for the rank that failed."""

from collections.abc import Callable

import torch.distributed as dist


def together(what: str, work: Callable[[], None], error: type[Exception] = OSError) -> None:
    """Call `work`, which must not be collective, on every rank. Collective.

    Raises:
        error: on every rank, where one of them failed; begins with `what`.
    """
    said: list[str | None] = [None] * dist.get_world_size()
    failed = None
    try:
        work()
    except Exception as reason:  # the other ranks wait for word, whatever it is
        failed = f"{what}: rank {dist.get_rank()}: {type(reason).__name__}: {reason}"
    dist.all_gather_object(said, failed)
    if failed := next(filter(None, said), None):
        raise error(failed)
