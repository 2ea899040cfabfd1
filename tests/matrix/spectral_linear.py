"""Sparse Spectral Training as its paper describes it: layers that multiply with factors, autograd, PyTorch's Adam."""

import torch
from torch import nn

from relora_ds.lowrank.seeding import keyed_generator


class Enhanced(torch.autograd.Function):
    """`y = ((x·V) ∘ σ)·Uᵀ`; the gradients of U and V are without σ."""

    @staticmethod
    def forward(ctx, x, left, sigma, right):
        images = x @ right
        ctx.save_for_backward(x, left, sigma, right, images)
        return (images * sigma) @ left.t()

    @staticmethod
    def backward(ctx, grad):
        x, left, sigma, right, images = ctx.saved_tensors
        back = grad @ left
        x, grad, images, flat = (value.flatten(0, -2) for value in (x, grad, images, back))
        return (back * sigma) @ right.t(), grad.t() @ images, (flat * images).sum(0), x.t() @ flat


class SpectralLinear(nn.Module):
    """A linear without bias whose r sampled columns of U and V, and all of σ, are parameters.

    Call `begin_step` before a step's first forward, then `step` after its backward.
    """

    def __init__(self, weight, r, *, key, iteration_steps, iteration_warmup_steps=0, betas=(0.9, 0.999), eps=1e-8):
        super().__init__()
        self.first, self.r, self.key = weight.detach().clone(), r, key
        self.iteration_steps, self.warmup, self.adam = iteration_steps, iteration_warmup_steps, (betas, eps)
        self.count = 0

    def begin_step(self):
        p = min(self.first.shape)
        if self.count % self.iteration_steps:
            return
        iteration = self.count // self.iteration_steps
        betas, eps = self.adam
        if iteration % -(-p // self.r) == 0:
            weight = self.first if iteration == 0 else self.weight()
            left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
            signs = torch.stack([column[column.abs().argmax()].sign() for column in left.t()])
            self.left, self.right, self.sigma = left * signs, right.t() * signs, nn.Parameter(sigma)
            self.of_sigma = torch.optim.Adam([self.sigma], betas=betas, eps=eps)
        else:
            self.left, _, self.right = self.factors()
        sigma = self.sigma.detach().double()
        chances = 0.5 / p + 0.5 * sigma / sigma.sum()
        drawn = torch.multinomial(chances, self.r, generator=keyed_generator(f"{self.key}/{iteration}"))
        self.sampled = drawn.sort().values
        self.active = nn.ParameterList([factor[:, self.sampled].clone() for factor in (self.left, self.right)])
        self.of_columns = torch.optim.Adam(self.active, betas=betas, eps=eps)

    def factors(self):
        """U, σ, V with the columns that train, without gradients."""
        left, right = (
            whole.index_copy(1, self.sampled, active.detach())
            for whole, active in zip((self.left, self.right), self.active, strict=True)
        )
        return left, self.sigma.detach(), right

    def weight(self):
        left, sigma, right = self.factors()
        return left @ sigma.diag() @ right.t()

    def forward(self, x):
        left = self.left.index_copy(1, self.sampled, self.active[0])
        right = self.right.index_copy(1, self.sampled, self.active[1])
        return Enhanced.apply(x, left, self.sigma, right)

    def step(self, lr):
        if self.warmup:
            lr = lr * min(1, (self.count % self.iteration_steps + 1) / self.warmup)
        for optimizer in (self.of_columns, self.of_sigma):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            self.sigma.relu_()
            for active in self.active:
                active.div_(active.norm(dim=0))
        self.count += 1
