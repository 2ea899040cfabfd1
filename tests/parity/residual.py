"""One-sided chains with residual updates: in plain PyTorch, and what runs on the ranks to be compared with it."""

import functools

import torch

from relora_ds.lowrank.reinit import random_basis
from tests.parity import cases
from tests.parity.reference import Reference, ReferenceConv1D, ReferenceStack, jagged_cosine
from tests.small_models import FAMILIES, batch
from tests.zero.restarts import fingerprint
from tests.zero.test_nonfinite import bytes_of

RESTART_EVERY, EVERY, STEPS, PEAK = 12, 4, 26, 0.02


class ResidualReference(Reference):
    """Projects every step's gradient of every W, and orthogonalises the sum of `EVERY` by its decomposition in fp64.

    `gradients`: those of the first update, `[..., out, in]`, by layer.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)  # not one of `parameters`: neither clipped nor stepped
        self.sums, self.gradients = {}, {}

    def step(self, tokens, num_micro_batches=1):
        factor = self.schedule(self.t)
        left = {name: layer.left for name, layer in self.layers.items()}  # that forward multiplies W by
        loss = super().step(tokens, num_micro_batches)
        for name, layer in self.layers.items():
            gradient = layer.weight.grad / left[name]
            gradient = gradient.t() if isinstance(layer, ReferenceConv1D) else gradient
            rest = gradient - (gradient @ layer.lora_A.mT) @ layer.lora_A
            self.sums[name] = self.sums.get(name, 0) + rest / EVERY
            layer.weight.grad = None
        if self.t % EVERY == 0:
            self._update(PEAK * factor)
        return loss

    @torch.no_grad()
    def _update(self, lr):
        sums, self.sums = self.sums, {}
        self.gradients = self.gradients or sums
        for name, layer in self.layers.items():
            gradient = sums[name].double()
            left, values, right = torch.linalg.svd(gradient, full_matrices=False)
            values = values / values.square().sum(-1, keepdim=True).sqrt()
            for _ in range(5):
                values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
            change = (
                -lr * max(1, gradient.shape[-2] / gradient.shape[-1]) ** 0.5 * (left * values[..., None, :] @ right)
            )
            layer.weight += (change.mT if isinstance(layer, ReferenceConv1D) else change) / layer.left

    def merged(self) -> dict[str, torch.Tensor]:
        """`ρ·W + s·B·A` by layer."""
        found = {}
        for name, layer in self.layers.items():
            update = layer.scaling * layer.lora_B @ layer.lora_A
            update = update.t() if isinstance(layer, ReferenceConv1D) else update
            found[name] = (layer.left * layer.weight + update).detach()
        return found


class StoredReference(ResidualReference):
    """Forward and backward read W as `rounded` leaves it; updates and merges change the master."""

    def __init__(self, rounded, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rounded = rounded
        self.masters = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self._changed(lambda: None)

    @torch.no_grad()
    def _changed(self, change):
        for name, layer in self.layers.items():
            layer.weight.copy_(self.masters[name])
        change()
        for name, layer in self.layers.items():
            self.masters[name] = layer.weight.detach().clone()
            layer.weight.copy_(self.rounded(self.masters[name]))

    def _update(self, lr):
        self._changed(lambda: super(StoredReference, self)._update(lr))

    def restart(self):
        self._changed(super().restart)

    def merged(self):
        for name, layer in self.layers.items():
            layer.weight.data.copy_(self.masters[name])
        return super().merged()


def reference(
    family: str = "llama", weight_decay: float = 0.0, reset: str = "rotate", rounded=None, **model_changes
) -> dict:
    """The run and what it leaves. rounded: W as it is stored, in its own dtype and shape; by default W itself."""
    model = FAMILIES[family](**model_changes)

    def random_A(name: str, restart: int) -> torch.Tensor:
        return random_basis(model.get_submodule(name).lora_A.shape, f"0/{restart}/{name}")

    schedule = jagged_cosine(cases.STEPS, cases.WARMUP, RESTART_EVERY, cases.REWARM, cases.MIN_RATIO)
    kind = ResidualReference if rounded is None else functools.partial(StoredReference, rounded)
    plain = kind(
        *(model, 4, cases.SCALING, random_A, cases.LR, weight_decay, cases.CLIP, schedule, reset, 0.9), one_sided=True
    )
    losses = []
    for step in range(STEPS):
        losses.append(plain.step(batch(step, cases.GLOBAL_BATCH)))
        if plain.t % RESTART_EVERY == 0:
            plain.restart()
    names = {
        name if isinstance(layer, ReferenceStack) else f"{name}.weight": name for name, layer in plain.layers.items()
    }
    merged = plain.merged()
    return {
        "losses": losses,
        "weights": {plain_name: merged[name] for plain_name, name in names.items()},
        "gradients": plain.gradients,
    }


def config(family: str = "llama", **changes):
    own = dict(restart_every=RESTART_EVERY, residual_every=EVERY, residual_lr=PEAK)
    return cases.one_sided_config(family, **{**own, **changes})


def train_case(stage: int, family: str = "llama", weight_decay: float = 0.0, relora=(), **how) -> dict:
    """On a rank: the same run in an engine; `stored`: a hash of what forward reads, after every period."""
    engine = cases.build(stage, family=family, weight_decay=weight_decay, relora=config(family, **dict(relora)), **how)
    update, gradients, stored, losses = engine.residual._update, [], [], []

    def spy(gradient):
        gradients.append(gradient.to("cpu", copy=True))
        return update(gradient)

    for step in range(STEPS):
        engine.residual._update = spy if step < EVERY else update
        losses.append(cases.train_step(engine, step))
        if engine.t % EVERY == 0:
            stored.append(fingerprint(bytes_of(cases.stored_weights(engine))))
    owned = [name for names in engine.frozen.rounds() for name in names if name in engine.frozen.owned()]
    result = {
        "losses": losses,
        "restarts": list(engine.restarts),
        "updates": engine.residual.count,
        "stored": stored,
        "gradients": dict(zip(owned, gradients, strict=True)),
        "weights": engine.collect_merged(),
    }
    cases.release(engine)
    return result
