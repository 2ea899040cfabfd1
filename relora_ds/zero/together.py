"""Run work that may fail on one rank: all ranks learn of a failure, and none waits for the rank that failed."""

from collections.abc import Callable

import torch.distributed as dist


def together(what: str, work: Callable[[], object], error: type[Exception] = OSError, *others: type[Exception]) -> None:
    """Call `work`, which must not be collective, on every rank. Collective.

    Raises:
        error: on every rank, where one of them failed; begins with `what`. One of `others` where that rank's error is
            of this class.
    """
    said: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    failed = None
    try:
        work()
    except Exception as reason:  # the other ranks wait for word, whatever it is
        kind = type(reason).__name__
        failed = kind, f"{what}: rank {dist.get_rank()}: {kind}: {reason}"
    dist.all_gather_object(said, failed)
    if first := next(filter(None, said), None):
        kind, text = first
        raise next((other for other in others if other.__name__ == kind), error)(text)
