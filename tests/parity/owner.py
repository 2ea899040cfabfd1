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
    experts = [layer for layer, parameter in model.named_parameters() if parameter.ndim == 3]
    return dict.fromkeys([*(one for one in linears if model.get_submodule(one) is not head), *experts], optimizer)


def reference(name: str, family: str = "llama", weight_decay: float = cases.DECAY, **changes) -> dict:
    """One process: all gradients clipped together, AdamW for the rest, the optimizer for what it is for."""
    model = FAMILIES[family](0, **changes)
    optimizers = by_layer(name, model)
    weights = {layer: _weight(model, layer) for layer in optimizers}
    states = {layer: optimizers[layer].begin(_as_linear(*weight).shape) for layer, weight in weights.items()}
    owned = {id(weight) for weight, _ in weights.values()}
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
            for layer, (parameter, transposed) in weights.items():
                weight, optimizer = _as_linear(parameter.data, transposed), optimizers[layer]
                gradient = _as_linear(parameter.grad, transposed)
                change = optimizer.update(gradient, states[layer], own_lr, f"0/{layer}")
                if optimizer.decays_first:
                    weight.mul_(1 - own_lr * weight_decay).add_(change)
                else:
                    weight.add_(change).mul_(1 - own_lr * weight_decay)
        model.zero_grad()
    return {"losses": losses, "weights": {name: p.detach().clone() for name, p in model.named_parameters()}}


def _weight(model: torch.nn.Module, layer: str) -> tuple[torch.nn.Parameter, bool]:
    """The weight of a layer, which may be a parameter itself, and whether it is `[in, out]`."""
    if layer in dict(model.named_parameters()):
        return model.get_parameter(layer), False
    module = model.get_submodule(layer)
    return module.weight, type(module).__name__ == "Conv1D"


def _as_linear(value: torch.Tensor, transposed: bool) -> torch.Tensor:
    return value.mT if transposed else value


def build(stage: int, name: str, family: str = "llama", **how):
    optimizer = OPTIMIZERS[name]
    relora = config(target_modules="all-matrices") if isinstance(optimizer, dict) else config()
    if family == "mixtral":
        relora = config(**cases.EXPERTS)
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
