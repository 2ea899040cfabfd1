"""Weights that their owners update: in plain PyTorch, and what runs on the ranks to be compared with it."""

import torch

from relora_ds.config import ReLoRAConfig
from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.muon_update import Muon
from relora_ds.matrix.scale_update import Scale
from tests.parity import cases
from tests.parity.reference import jagged_cosine
from tests.small_models import FAMILIES, batch

STEPS, GAP, CLIP = 14, 5, 0.45
OPTIMIZERS = {
    "fira": Fira(r=4, update_proj_gap=GAP),
    "fira, paper": Fira(r=4, update_proj_gap=GAP, variant="paper"),
    "apollo": Apollo(r=4, update_proj_gap=GAP),
    "apollo_mini": Apollo(r=1, update_proj_gap=GAP, scale=4.0, scale_type="tensor"),
    "scale": Scale(),
    "scale, all matrices": {"model.embed_tokens": Scale("embedding"), "lm_head": Scale("head")},  # else Scale()
    "muon": Muon(),
}

# At that of the others, SCALE moves weights by a fifth of their size in a step, and what rounding does grows.
OWN_LR = {"scale": 1e-3, "scale, all matrices": 1e-3}


def config(**changes) -> ReLoRAConfig:
    return ReLoRAConfig(trains="none", **changes)


def by_layer(name: str, model: torch.nn.Module) -> dict:
    """The optimizer of each weight that owners update."""
    optimizer, head, kinds = OPTIMIZERS[name], model.get_output_embeddings(), ("Linear", "Conv1D")
    linears = [layer for layer, module in model.named_modules() if type(module).__name__ in kinds]
    if isinstance(optimizer, dict):
        return {**dict.fromkeys(linears, Scale()), **optimizer}
    return {layer: optimizer for layer in linears if model.get_submodule(layer) is not head}


def reference(name: str, family: str = "llama", weight_decay: float = cases.DECAY, **changes) -> dict:
    """One process: all gradients clipped together, AdamW for the rest, the optimizer for what it is for."""
    model = FAMILIES[family](0, **changes)
    optimizers = by_layer(name, model)
    linears = {layer: model.get_submodule(layer) for layer in optimizers}
    states = {layer: optimizers[layer].begin(_as_linear(module).shape) for layer, module in linears.items()}
    owned = {id(module.weight) for module in linears.values()}
    rest = [p for p in model.parameters() if id(p) not in owned]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=cases.LR)
    schedule = jagged_cosine(cases.STEPS, cases.WARMUP, 10 * cases.STEPS, cases.REWARM, cases.MIN_RATIO)
    losses = []
    for step in range(STEPS):
        tokens = batch(step, cases.GLOBAL_BATCH)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        lr, own_lr = (peak * schedule(step) for peak in (cases.LR, OWN_LR.get(name, cases.LR)))
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        with torch.no_grad():
            for layer, module in linears.items():
                weight, optimizer = _as_linear(module), optimizers[layer]
                change = optimizer.update(_as_linear(module, "grad"), states[layer], own_lr, f"0/{layer}")
                if optimizer.decays_first:
                    weight.mul_(1 - own_lr * weight_decay).add_(change)
                else:
                    weight.add_(change).mul_(1 - own_lr * weight_decay)
        model.zero_grad()
    return {"losses": losses, "weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


def _as_linear(module: torch.nn.Module, what: str = "data") -> torch.Tensor:
    """Its weight, or the gradient of it, as `[out, in]`; a Conv1D has `[in, out]`. An embedding's, as it is."""
    value = getattr(module.weight, what)
    return value.t() if type(module).__name__ == "Conv1D" else value


def build(stage: int, name: str, family: str = "llama", **how):
    optimizer = OPTIMIZERS[name]
    relora = config(target_modules="all-matrices") if isinstance(optimizer, dict) else config()
    if isinstance(optimizer, dict):
        optimizer = by_layer(name, FAMILIES[family](0))
    how = {"clip": CLIP, "relora": relora, "matrix_lr": OWN_LR.get(name), **how}
    return cases.build(stage, family=family, matrix_optimizer=optimizer, **how)


def train_case(stage: int, name: str, family: str = "llama", **how) -> dict:
    """On a rank: the same run in an engine."""
    engine = build(stage, name, family, **how)
    result = {"losses": [], "norms": []}
    for step in range(STEPS):
        result["losses"].append(cases.train_step(engine, step))
        result["norms"].append(float(engine.get_global_grad_norm()))
    result["weights"] = engine.collect_merged()
    cases.release(engine)
    return result
