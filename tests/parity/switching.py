"""SwitchLoRA: in plain PyTorch, one process and whole tensors, and what runs on the ranks to be compared with it."""

import torch
from torch import nn
from torch.nn import functional as F

from relora_ds.config.switch_config import SwitchLoRAConfig
from relora_ds.lowrank import switching
from tests.parity import cases
from tests.parity.reference import jagged_cosine
from tests.small_models import FAMILIES, batch

R, STEPS, CLIP, BETAS, EPS = 4, 16, 0.4, (0.9, 0.999), 1e-8
CONFIG = SwitchLoRAConfig(interval=5, ratio=0.9, freeze_steps=2)


def relora(**changes):
    return cases.relora_config(**{"lora_alpha": 1, "restart_every": None, "restart_warmup_steps": 0, **changes})


def build(stage, config: SwitchLoRAConfig = CONFIG, **how):
    precision = how.get("precision", "fp32")
    how = {"relora": relora(frozen_dtype="fp32", **how.pop("changes", {})), "clip": CLIP, **how, "precision": precision}
    return cases.build(stage, switching=config, weight_decay=0.0, **how)


class Plain(nn.Module):
    """A linear with factors. Its vectors are `[r, ...]`: rows of A, and columns of B as rows."""

    def __init__(self, linear: nn.Module, name: str, transposed: bool):
        super().__init__()
        weight = linear.weight.detach().clone()
        self.register_buffer("weight", weight.t().clone() if transposed else weight)
        self.bias, self.name = linear.bias, name
        m, n = self.weight.shape
        self.many = min(m, n)
        std_A, std_B = switching.factor_stds(m, n, R)
        key = f"0/{name}/switching/"
        self.A = nn.Parameter(switching.drawn(R, n, std_A, f"{key}A"))
        self.B = nn.Parameter(switching.drawn(m, R, std_B, f"{key}B"))
        self.candidates = [
            switching.drawn(self.many, size, std, f"{key}candidates of {factor}")
            for factor, size, std in (("A", n, std_A), ("B", m, std_B))
        ]
        self.counts, self.resets = [0, 0], {"A": [0] * R, "B": [0] * R}
        self.moments = {factor: torch.zeros(2, *getattr(self, factor).shape) for factor in "AB"}
        self.weight -= self.B.detach() @ self.A.detach() / R

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.A), self.B) / R

    def vector(self, factor: str, i: int, of: torch.Tensor) -> torch.Tensor:
        return of[..., i, :] if factor == "A" else of[..., :, i]

    @torch.no_grad()
    def step(self, t: int, lr: float, freeze: int) -> None:
        """Take Adam's step number t, from 1, vector by vector."""
        for factor in "AB":
            for i in range(R):
                since = self.resets[factor][i]
                k = t - since
                if since and k <= freeze:
                    continue
                gradient = self.vector(factor, i, getattr(self, factor).grad)
                m, v = self.vector(factor, i, self.moments[factor])
                m.copy_(BETAS[0] * m + (1 - BETAS[0]) * gradient)
                v.copy_(BETAS[1] * v + (1 - BETAS[1]) * gradient**2)
                mean, square = m / (1 - BETAS[0] ** k), v / (1 - BETAS[1] ** k)
                self.vector(factor, i, getattr(self, factor).data).sub_(lr * mean / (square.sqrt() + EPS))

    @torch.no_grad()
    def switch(self, t: int, every: float) -> None:
        """Switch what is due after step t, one vector after the other."""
        for of, (factor, other) in enumerate(("AB", "BA")):
            start = self.counts[of]
            for j in range(switching.num_switched(R / every, f"0/{self.name}/switching/{t}/{factor}")):
                i, slot = (start + j + (R // 2) * of) % R, (start + j) % self.many
                own, new = self.vector(factor, i, getattr(self, factor).data), self.candidates[of][slot].clone()
                against = self.vector(other, i, getattr(self, other))
                change = torch.outer(against, own - new) if factor == "A" else torch.outer(own - new, against)
                self.weight += change / R
                self.candidates[of][slot] = own.clone()
                own.copy_(new)
                self.resets[other][i] = t
                self.vector(other, i, self.moments[other]).zero_()
                self.counts[of] += 1


def reference(family: str = "llama", config: SwitchLoRAConfig = CONFIG) -> dict:
    model = FAMILIES[family](0)
    head, layers = model.get_output_embeddings(), {}
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head:
            parent, _, leaf = name.rpartition(".")
            layers[name] = Plain(module, name, transposed=type(module).__name__ == "Conv1D")
            setattr(model.get_submodule(parent), leaf, layers[name])
    factors = {id(p) for layer in layers.values() for p in (layer.A, layer.B)}
    adam = torch.optim.AdamW([p for p in model.parameters() if id(p) not in factors], weight_decay=0.0)
    schedule = jagged_cosine(cases.STEPS, cases.WARMUP, 10 * cases.STEPS, cases.REWARM, cases.MIN_RATIO)
    losses, norms = [], []
    for step in range(STEPS):
        tokens = batch(step, cases.GLOBAL_BATCH)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        adam.param_groups[0]["lr"] = lr = cases.LR * schedule(step)
        adam.step()
        every = switching.interval(step + 1, cases.STEPS, first=config.interval, ratio=config.ratio)
        for layer in layers.values():
            layer.step(step + 1, lr, config.freeze_steps)
            layer.switch(step + 1, every)
        model.zero_grad()
    return {
        "losses": losses,
        "norms": norms,
        "switched": {name: layer.counts for name, layer in layers.items()},
        "merged": {name: (layer.weight + layer.B @ layer.A / R).detach() for name, layer in layers.items()},
        "frozen": {name: layer.weight.clone() for name, layer in layers.items()},
    }


def train_case(stage: int, family: str = "llama", **how) -> dict:
    """On a rank: the same run in an engine."""
    engine = build(stage, family=family, **how)
    result = {"losses": [], "norms": []}
    for step in range(STEPS):
        result["losses"].append(cases.train_step(engine, step))
        result["norms"].append(float(engine.get_global_grad_norm()))
    weights, layers = engine.collect_merged(), engine.frozen.layers
    result["merged"] = {name: weights[f"{name}.weight"] for name in layers}
    stored = cases.stored_weights(engine)
    result["frozen"] = {name: stored[name] for name in layers}
    result["switched"] = dict(engine.switching._counts)
    cases.release(engine)
    return result
