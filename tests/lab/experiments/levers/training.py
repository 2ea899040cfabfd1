"""Train one variant at the scale `tiny`, in one process."""

import math

import torch
from torch import Tensor

from tests.lab.experiments.levers.chain import Adam, Chain, Settings
from tests.lab.experiments.levers.network import RECIPE, Network, batches, validation_loss

STEPS = RECIPE.train.steps
BOTH_EVERY, RAMP = 1000, 50  # of a phase in which both factors train


def train(settings: Settings, seed: int, steps: int = STEPS) -> float:
    """Return the validation loss at the end."""
    network, order = Network(seed), batches(seed)
    parameters = network.parameters
    low = [name for name in parameters if "_proj" in name]
    generator = torch.Generator().manual_seed(1000 + seed)
    adam = {name: Adam(value.shape, settings.betas) for name, value in parameters.items()}
    chains = {name: Chain(parameters[name].data, settings, generator) for name in low}
    pairs: dict[str, Pair] = {}
    restart_at = settings.full_steps
    for step in range(steps):
        ids = next(order)
        found = torch.autograd.grad(network.loss(ids, ids), list(parameters.values()))
        gradients = dict(zip(parameters, found, strict=True))
        decay = curve(step, steps)
        in_chain = settings.method == "chain" and step >= settings.full_steps
        with torch.no_grad():
            if settings.both_from is not None and step == settings.both_from:
                pairs = {name: Pair(chains[name]) for name in low}
            if in_chain and not pairs and step >= restart_at:
                part = (step - settings.full_steps) / max(1, steps - settings.full_steps)
                r = settings.r if settings.r_end is None else round(settings.r + (settings.r_end - settings.r) * part)
                for name in low:
                    chains[name].restart(gradients[name], r)
                growth = (settings.restart_every_end or settings.restart_every) / settings.restart_every
                restart_at = step + max(2, round(settings.restart_every * growth**part))
            clip = _clip(gradients, chains if in_chain else {}, pairs)
            low_lr = (settings.lr if settings.lr_low is None else settings.lr_low) * decay
            for name, gradient in gradients.items():
                if pairs and name in pairs:
                    pairs[name].step(gradient, clip, low_lr)
                elif in_chain and name in chains:
                    chains[name].step(gradient * clip, low_lr, decay, step < settings.fira_steps)
                else:
                    lr = settings.lr if in_chain else settings.lr_full
                    parameters[name].data.sub_(adam[name].update(gradient * clip) * (lr * decay))
    return validation_loss(network)


class Pair:
    """Both factors of a weight's update, which begin in the chain's basis and with its moments."""

    def __init__(self, chain: Chain):
        assert chain.basis is not None and not chain.left
        self.weight, self.settings = chain.weight, chain.settings
        self.frozen, self.A, self.B = chain.weight.clone(), chain.basis.clone(), torch.zeros_like(chain.adam.mean)
        self.adam_A, self.adam_B = Adam(self.A.shape, chain.settings.betas), chain.adam
        self.steps = 0

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return self.B.T @ gradient, gradient @ self.A.T

    def step(self, gradient: Tensor, clip: float, lr: float) -> None:
        if self.steps and self.steps % BOTH_EVERY == 0:
            self.frozen, self.B = self.weight.clone(), torch.zeros_like(self.B)
            self.A = torch.empty_like(self.A).uniform_(-1, 1) / math.sqrt(self.A.shape[1])
            self.adam_A, self.adam_B = (Adam(x.shape, self.settings.betas) for x in (self.A, self.B))
        lr *= min(1.0, (self.steps % BOTH_EVERY + 1) / RAMP)
        self.steps += 1
        of_A, of_B = self.gradients(gradient)
        self.A.sub_(self.adam_A.update(of_A * clip) * lr)
        self.B.sub_(self.adam_B.update(of_B * clip) * lr)
        self.weight.copy_(self.frozen + self.B @ self.A)


def _clip(gradients: dict[str, Tensor], chains: dict[str, Chain], pairs: dict[str, Pair]) -> float:
    """Return the factor that clips the norm over all that trains."""
    square = 0.0
    for name, gradient in gradients.items():
        if name in pairs:
            square += sum(float(part.square().sum()) for part in pairs[name].gradients(gradient))
        elif name in chains:
            square += chains[name].norm_square(gradient)
        else:
            square += float(gradient.square().sum())
    return min(1.0, RECIPE.optim.max_grad_norm / (math.sqrt(square) + 1e-6))


def curve(step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0, as a part of its peak."""
    warmup, lowest = RECIPE.optim.warmup_steps, RECIPE.optim.min_lr_ratio
    if step < warmup:
        return (step + 1) / warmup
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
