"""Islands on a linear layer and a least-squares problem, through the engine and its exchanges."""

import torch
from torch import nn

import relora_ds
from relora_ds.config import IslandsConfig
from relora_ds.exchange.island import Islands
from relora_ds.zero.start import init_distributed
from relora_ds.zero.teardown import release
from tests.islands.servers import SECRET

LR = 0.05


class Linear(nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data.copy_(weight)

    def forward(self, x, y):
        return (self.linear(x) - y).square().sum() / (2 * len(x))


def _engine(model, address, index, stage, total, relora=None, **islands):
    config = IslandsConfig(**{"count": 2, "index": index, "address": address, **islands})
    init_distributed()
    return relora_ds.initialize(
        model if relora is None else relora_ds.wrap(model, relora),
        f"zero{stage}",
        lr=LR,
        total_steps=total,
        schedule="constant",
        betas=(0.9, 0.95),
        precision="fp32",
        micro_batch_size=4 // torch.distributed.get_world_size(),  # islands weigh alike
        max_grad_norm=0.0,
        islands=Islands(config, secret=SECRET),
    )[0]


def train(index, address, W, x, y, *, stage, every, rounds, inner, **islands) -> list[torch.Tensor]:
    """Return the weight after each exchange; inner: "adam" (the engine's own) or "sgd", which writes the weights."""
    engine = _engine(Linear(W), address, index, stage, every * rounds, sync_every=every, **islands)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
    name, found = "linear.weight", []
    engine.exchange.begin()
    for t in range(1, every * rounds + 1):
        if inner == "adam":
            engine.backward(engine(x[mine], y[mine]))
            engine.step()
        else:
            weight = engine.shards.gather([name])[name]
            gradient = (x @ weight.T - y).T @ x / len(x)
            engine.shards.write(name, weight - LR * gradient)
            engine.lr_scheduler.move_to(t)
            engine.exchange.after_step()
        if t % every == 0:
            found.append(engine.shards.gather([name])[name].clone())
    _leave(engine)
    return found


def merge(index, address, W, lora_A, lora_B, *, stage, one_sided: bool) -> torch.Tensor:
    """Return what a restart makes of W and this island's factors; of A only where both train."""
    r = len(lora_A)
    trains = {"trains": "B", "restart_init": "random", "optimizer_reset": "none"} if one_sided else {}
    relora = relora_ds.ReLoRAConfig(r=r, lora_alpha=2.0 * r, restart_every=2, restart_warmup_steps=1, **trains)
    engine = _engine(Linear(W), address, index, stage, 8, relora, outer_optimizer="average")
    engine.exchange.begin()
    if one_sided:
        mine = engine.frozen.owners["linear"] == torch.distributed.get_rank()
        engine.frozen.publish_A("linear", lora_A if mine else None)
    else:
        engine.shards.write("linear.lora_A", lora_A)
    engine.shards.write("linear.lora_B", lora_B)
    engine.lr_scheduler.move_to(2)
    engine.exchange.after_step()
    merged = engine.collect_merged()["linear.weight"]
    _leave(engine)
    return merged


def drift(index, address, update, rounds: int, **islands) -> torch.Tensor:
    """Return what is left of the same update, made `rounds` times, one exchange each."""
    engine = _engine(Linear(torch.zeros_like(update)), address, index, 1, rounds, sync_every=1, **islands)
    name = "linear.weight"
    engine.exchange.begin()
    for t in range(1, rounds + 1):
        engine.shards.write(name, engine.shards.gather([name])[name] + update)
        engine.lr_scheduler.move_to(t)
        engine.exchange.after_step()
    found = engine.shards.gather([name])[name]
    _leave(engine)
    return found


def _leave(engine) -> None:
    engine.exchange._islands.close()
    release(engine)
