"""Engines of a recipe on the ranks, without a corpus: what planning says about them is compared with what they hold."""

import torch
import torch.distributed as dist

from relora_ds.exchange.island import Islands
from relora_ds.planning.cost import Cost, cost
from relora_ds.planning.network import network_of
from relora_ds.training.phases import Phase, build_engine, phases_of
from relora_ds.training.preflight import Plan, Resolved, resolve
from relora_ds.zero.engine import ReLoRAEngine
from relora_ds.zero.teardown import release
from relora_ds.zero.traffic import count_traffic
from tests.islands.servers import SECRET

WORLD = 2
VOCAB = 1000


def overrides(stage: int, precision: str, method: str, accumulation: int = 1, *more: str) -> list[str]:
    """llama_20m: small, and large enough that constants and padding do not count."""
    return [
        "model.preset=llama_20m",
        f"data.vocab_size={VOCAB}",
        "relora.r=8",
        "warm_start_steps=0",
        f"deepspeed=zero{stage}",
        f"precision={precision}",
        f"method={method}",
        "train.micro_batch_size=1",
        f"train.batch_sequences={WORLD * accumulation}",
        *more,
    ]


def planned(changes: list[str]) -> Cost:
    """The cost of a recipe of one phase, as `check` and `estimate` compute it."""
    resolved, phase = _read(changes)
    return cost(resolved, phase.method, network_of(resolved.recipe)[0])


def build(changes: list[str]) -> ReLoRAEngine:
    """On a rank: the engine that training would build."""
    resolved, phase = _read(changes)
    plan = Plan(**vars(resolved), data=None, tokenizer=None, model_config=network_of(resolved.recipe)[0])
    islands = None if plan.recipe.islands.count is None else Islands(plan.recipe.islands, secret=SECRET)
    return build_engine(plan, phase, islands=islands)


def micro_step(engine: ReLoRAEngine, number: int) -> None:
    """Forward and backward of one short sequence."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + number)
    tokens = torch.randint(0, VOCAB, (1, 4), generator=generator)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)


def sent_in_a_step(changes: list[str]) -> tuple[float, float]:
    """On a rank: `(payload, wire)` of the third step."""
    engine = build(changes)
    for step in range(3):
        with count_traffic() as traffic:
            micro_step(engine, step)
            engine.step()
    release(engine)
    return traffic.payload, traffic.wire


def _read(changes: list[str]) -> tuple[Resolved, Phase]:
    resolved = resolve("tiny", changes, WORLD, to_run=False)
    (phase,) = phases_of(resolved.recipe)
    return resolved, phase
