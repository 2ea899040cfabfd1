"""A server that is killed at any time and started again: nothing is lost, nothing counts twice."""

import json
import random
import threading
import time

import pytest

from relora_ds.islands.framing import CHUNK
from relora_ds.utils.ports import free_port
from tests.islands.servers import IDENTITY, Process, blob, link, run_together

RANKS = [("a", 0), ("a", 1), ("b", 0)]


def size(round):
    return 5 * CHUNK // 2 if round % 10 == 0 else 20_000


def name(rank):
    return f"w.{rank}"


def train(address, island, rank, num_rounds, seen):
    """Append the decisions that a rank sees, each after it has compared every blob; return them."""
    world_size = sum(other == island for other, _ in RANKS)
    one = link(address, island, rank=rank, world_size=world_size, timeout_s=60.0)
    one.join(IDENTITY, 0)
    for round in range(1, num_rounds + 1):
        facts = {"tokens": len(island) * round}
        one.contribute(round, {name(rank): blob(size(round), round, island, rank)}, facts, round)
        while (decision := one.decision(round)) is None:
            pass
        seen.append(decision)
        for other, its in RANKS:
            found = one.fetch(round, other, [name(its)], {name(its): size(round)})
            assert bytes(found[name(its)]) == blob(size(round), round, other, its), f"round {round} of {other}"
        assert [*decision.islands] == ["a", "b"] and decision.missing == ()
        one.agree(round, {"w": round})
    one.close()
    return seen


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_fifty_rounds_while_the_server_is_killed(tmp_path, seed):
    server, random_, is_over = Process(tmp_path, free_port()), random.Random(seed), threading.Event()
    seen = [[] for _ in RANKS]
    kills_after = sorted(random_.sample(range(1, 50), 12))  # rounds: between two kills there is progress

    def kill():
        for round in kills_after:
            while len(seen[0]) < round and not is_over.wait(0.002):
                pass
            time.sleep(random_.uniform(0, 0.05))
            server.kill()
            time.sleep(random_.uniform(0, 0.2))
            server.start()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_together(*(lambda i=i: train(server.address, *RANKS[i], 50, seen[i]) for i in range(len(RANKS))))
    finally:
        is_over.set()
        killer.join()
        server.kill()
    assert seen[0] == seen[1] == seen[2] and [one.round for one in seen[0]] == [*range(1, 51)]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [*range(1, 51)]
    assert [line["bytes"] for line in lines] == [3 * size(line["round"]) for line in lines]
    assert [line["islands"] for line in lines] == [one.islands for one in seen[0]]
