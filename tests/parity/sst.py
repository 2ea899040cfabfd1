"""Sparse Spectral Training by layers that multiply with factors, in one process, and what runs on the ranks."""

import torch
from torch import nn

from relora_ds.lowrank.targets import replace_modules
from relora_ds.matrix.sst_update import SST
from tests.matrix.spectral_linear import SpectralLinear
from tests.parity import cases, owner
from tests.parity.reference import jagged_cosine
from tests.small_models import FAMILIES, batch

# Of k and v, [10, 20], a round has two iterations; of the others it ends after the last step. Square ones have values
# that fall to 0, and a decomposition gives vectors of such a value signs by chance.
STEPS, R, OWN_LR, NETWORK = 12, 6, 2e-3, {"num_key_value_heads": 1}
SETTINGS = {"iteration_steps": 3, "iteration_warmup_steps": 2}


def reference(clip: float = 0.0) -> dict:
    """AdamW for what is no linear, and PyTorch's Adam for the factors of the others.

    clip: what the norm of all that trains is clipped to.
    """
    model = FAMILIES["llama"](0, **NETWORK)
    head, layers = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            assert module.bias is None
            layers[name] = SpectralLinear(module.weight, min(R, *module.weight.shape), key=f"0/{name}", **SETTINGS)
    replace_modules(model, layers)
    of_rest = dict(model.named_parameters())  # the layers make their factors later
    adamw = torch.optim.AdamW([*of_rest.values()], lr=cases.LR, weight_decay=0.0)
    schedule = jagged_cosine(cases.STEPS, cases.WARMUP, 10 * cases.STEPS, cases.REWARM, cases.MIN_RATIO)
    losses = []
    for step in range(STEPS):
        for layer in layers.values():
            layer.begin_step()
        tokens = batch(step, cases.GLOBAL_BATCH)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        if clip:
            of_layers = [p for layer in layers.values() for p in (*layer.active, layer.sigma)]
            torch.nn.utils.clip_grad_norm_([*of_rest.values(), *of_layers], clip)
        adamw.param_groups[0]["lr"] = cases.LR * schedule(step)
        adamw.step()
        for layer in layers.values():
            layer.step(OWN_LR * schedule(step))
        adamw.zero_grad()
    rest = {name: parameter.detach() for name, parameter in of_rest.items()}
    return {"losses": losses, "weights": rest | {f"{name}.weight": layer.weight() for name, layer in layers.items()}}


def build(stage: int, *, r: int = R, **how):
    rule, how = SST(r, **SETTINGS), {"weight_decay": 0.0, "clip": 0.0, "relora": owner.config(), **NETWORK, **how}
    return cases.build(stage, matrix_optimizer=rule, matrix_lr=OWN_LR, **how)


def train_case(stage: int, **how) -> dict:
    """On a rank: the same run in an engine."""
    engine = build(stage, **how)
    losses = [cases.train_step(engine, step) for step in range(STEPS)]
    result = {"losses": losses, "weights": engine.collect_merged(), "states": engine.owner_steps.held()}
    cases.release(engine)
    return result
