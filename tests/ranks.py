"""A few processes that stand ready as ranks, so that a distributed test costs milliseconds and not imports.

    results = ranks(2).run(case, argument, ...)     # case(argument, ...) on every rank; results in rank order

The processes come from a forkserver that has torch, deepspeed and the trainer imported already. They
live as long as the test session and run one case after another over one gloo process group. A case that
raises fails the test with the rank's traceback; one that hangs is killed.

They see no GPU. Those of `Ranks(n, prepare)` are fresh processes, in which `prepare()` comes before all imports.
"""

import atexit
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections.abc import Callable

from relora_ds.utils.ports import free_port
from tests.devices import hide_gpus

hide_gpus()
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "relora_ds.training.trainer",
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
    ]
)


def _serve(prepare: Callable[[], object] | None, rank: int, world_size: int, port: int, pipe) -> None:
    if prepare is not None:
        prepare()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    import logging

    import torch

    from relora_ds.zero.start import init_distributed

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    init_distributed()
    while True:
        try:
            case, args, kwargs = pipe.recv()
        except EOFError:  # the test session is gone
            return
        gc.collect()
        gc.freeze()  # What was imported is gone through no more: DeepSpeed collects garbage often, the tests too.
        try:
            pipe.send((True, case(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    """`world_size` rank processes; `prepare`: see above, an importable function."""

    def __init__(self, world_size: int, prepare: Callable[[], object] | None = None):
        self.world_size, self._prepare = world_size, prepare
        self._workers: list = []

    def run(self, case: Callable, *args, timeout: float = 600, **kwargs) -> list:
        """Call `case` (importable, with picklable arguments and result) on every rank; results in rank order."""
        if not self._workers:
            self._start()
        for rank, (_, pipe) in enumerate(self._workers):
            try:
                pipe.send((case, args, kwargs))
            except OSError:
                self._fail(f"rank {rank}:\nit died")
        answers: dict[int, object] = {}
        deadline = time.monotonic() + timeout
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(waiting.values())} did not answer in {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    fine, answers[rank] = pipe.recv()
                except (EOFError, OSError):  # also with words of ours still in the pipe
                    fine, answers[rank] = False, "it died"
                if not fine:
                    self._fail(f"rank {rank}:\n{answers[rank]}")
        return [answers[rank] for rank in range(self.world_size)]

    def _fail(self, message: str):
        self.stop()  # the other ranks may wait in a collective
        raise AssertionError(message)

    def stop(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        # Not daemons: a case may start children of its own (a DataLoader's workers).
        atexit.register(self.stop)
        port = free_port()
        context = _context if self._prepare is None else multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._prepare, rank, self.world_size, port, theirs))
            process.start()
            theirs.close()
            self._workers.append((process, ours))


@functools.cache
def ranks(world_size: int) -> Ranks:
    """The session's rank processes."""
    return Ranks(world_size)
