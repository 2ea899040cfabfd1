"""The groups of ranks on GPUs, NCCL's and gloo's, wait longer than the watchdog."""

from tests.emulated_cuda.pool import emulated_ranks
from tests.zero.test_timeouts import DAY, watched


def test_the_watchdog_is_quicker_than_every_collective_over_nccl():
    for world, all_groups in emulated_ranks(2).run(watched):
        assert min(world.values()) > DAY
        assert len(all_groups) >= len(world) + 2 and min(all_groups.values()) > DAY
