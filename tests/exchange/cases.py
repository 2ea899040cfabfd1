"""Islands of tiny models, each in a torch world of its own, and what they tell of their exchanges."""

import threading
from contextlib import contextmanager

import torch

import relora_ds
from relora_ds.config import IslandsConfig
from relora_ds.exchange.island import Islands
from relora_ds.zero.teardown import release
from tests import small_models
from tests.islands.servers import SECRET
from tests.ranks import Ranks

EVERY, ROUNDS = 3, 3
METHODS = {
    "full": None,
    "relora": dict(r=4, lora_alpha=8.0),
    "random": dict(r=4, lora_alpha=8.0, trains="B", restart_init="random", optimizer_reset="none"),
    "galore": dict(r=4, lora_alpha=8.0, trains="B", restart_init="gradient", optimizer_reset="none"),
}


def build(
    index,
    address,
    count,
    *,
    method="relora",
    stage=1,
    precision="fp32",
    size=2,
    total=EVERY * ROUNDS,
    model_seed=0,
    frozen=None,
    **islands,
):
    """Return an engine that is an island; a count of None: one that is none. size: sequences of each rank's batch."""
    settings = METHODS[method]
    model = small_models.llama(model_seed)
    if settings is not None:
        relora = relora_ds.ReLoRAConfig(
            **{**settings, "restart_every": EVERY, "restart_warmup_steps": 1, **(frozen or {})}
        )
        model = relora_ds.wrap(model, relora)
    config = None
    if count is not None:
        config = IslandsConfig(count=count, index=index, address=address, sync_every=EVERY, **islands)
    engine, *_ = relora_ds.initialize(
        model,
        f"zero{stage}",
        lr=1e-2,
        total_steps=total,
        precision=precision,
        micro_batch_size=size,
        weight_decay=0.1,
        islands=None if config is None else Islands(config, secret=SECRET),
    )
    return engine


def step(engine, index: int, number: int, size: int) -> float:
    """Take a step on a batch that no other island and rank has."""
    rank = torch.distributed.get_rank()
    tokens = small_models.batch(1000 * index + 100 * rank + number, size)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def train(index, address, count, *, size=2, steps=EVERY * ROUNDS, **how):
    """Train an island. Return its losses, what it has sent, and its weights after each exchange."""
    engine = build(index, address, count, size=size, **how)
    told: dict = {what: [] for what in ("losses", "sent", "weights", "anchors", "rho", "missing", "bytes")}
    told["weights"].append(engine.collect_merged(dst=0))
    swap = engine.exchange.swap

    def tell(factors, sketches):
        factors = [(name, a.clone(), b.clone()) for name, a, b in factors]
        told["sent"].append({name: (a, b) for name, a, b in factors})
        told["rho"].append(1.0 if engine.frozen.decay is None else float(engine.frozen.decay))
        told["anchors"].append({name: value.clone() for name, value in engine.exchange._masters()})
        swap(iter(factors), sketches)

    engine.exchange.swap = tell
    for number in range(steps):
        told["losses"].append(step(engine, index, number, size))
        if engine.exchange.t == engine.t:
            told["weights"].append(engine.collect_merged(dst=0))
            report = engine.exchange.reports[-1]
            told["missing"].append(report.missing)
            told["bytes"].append((report.bytes_sent, report.bytes_received))
    told |= {"t": engine.t, "round": engine.exchange.round, "restarts": engine.restarts}
    engine.exchange._islands.close()
    release(engine)
    return told


def train_alone(count, address, **how) -> list[tuple[float, dict]]:
    """Train up to the step before the last; return each step's loss, and the weights after it."""
    engine = build(0, address, count, **how)
    found = [(step(engine, 0, number, 2), engine.collect_merged(dst=0)) for number in range(EVERY * ROUNDS - 1)]
    if engine.exchange is not None:
        engine.exchange._islands.close()
    release(engine)
    return found


def at_once(*calls):
    """Run calls at the same time; return what they return, or raise what the first one has raised."""
    results, errors = [None] * len(calls), []

    def run(i):
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@contextmanager
def worlds(*sizes):
    """Give torch worlds of so many ranks each."""
    found = [Ranks(size) for size in sizes]
    try:
        yield found
    finally:
        for world in found:
            world.stop()


# An island that is told what to do step by step: its engine stays in the rank's process between calls.
_kept: dict = {}


def start(index, address, count, load=None, **how) -> int:
    """Build an island, from a checkpoint if one is given. Return its step when it has caught up."""
    if "engine" in _kept:
        end()
    _kept.update(engine=build(index, address, count, **how), index=index, size=how.get("size", 2))
    if load is not None:
        _kept["engine"].load_checkpoint(load)
    _kept["engine"].exchange.begin()
    return _kept["engine"].t


def go(t: int, save=None) -> dict:
    """Train to step `t`; save a checkpoint there if asked for. Return the state of the exchanges and the weights."""
    engine = _kept["engine"]
    while engine.t < t:
        step(engine, _kept["index"], engine.t, _kept["size"])
    if save is not None:
        engine.save_checkpoint(save)
    exchange = engine.exchange
    return {
        "t": engine.t,
        "round": exchange.round,
        "missing": exchange.reports[-1].missing if exchange.reports else (),
        "restarts": list(engine.restarts),
        "weights": engine.collect_merged(dst=0),
        "bases": {name: engine.frozen.read_A(name) for name in engine.frozen.one_sided},
    }


def end() -> None:
    """Leave the other islands, as one that is killed does."""
    engine = _kept.pop("engine")
    engine.exchange._islands.close()
    release(engine)
