"""GaLore, and the one-sided chain that equals it, in plain PyTorch. Imports nothing of relora_ds.

GaLore keeps a whole weight and projects its gradient. The chain trains `C` of `W + s·C·Q` with `Q` frozen, and merges
every T steps. Both are written down literally, apart from each other, for weights `[out, in]` of any floating dtype.
"""

import math

import torch


def canonical_svd(matrix):
    """U, S and Vᵀ with the largest entry of every column of U positive."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return left * signs, values, right * signs.T


def right_basis(gradient, r):
    """The r leading right singular vectors as rows."""
    return canonical_svd(gradient)[2][:r]


class Adam:
    """Moments of one tensor; `step` returns what to subtract for a learning rate of 1."""

    def __init__(self, shape, dtype, betas=(0.9, 0.999), eps=1e-8, style="torch"):
        self.m, self.v = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.betas, self.eps, self.style, self.count = betas, eps, style, 0

    def step(self, gradient):
        first, second = self.betas
        self.count += 1
        self.m = first * self.m + (1 - first) * gradient
        self.v = second * self.v + (1 - second) * gradient**2
        of_m, of_v = 1 - first**self.count, 1 - second**self.count
        if self.style == "hf":
            return math.sqrt(of_v) / of_m * self.m / (self.v.sqrt() + self.eps)
        return self.m / of_m / ((self.v / of_v).sqrt() + self.eps)

    def refresh(self, how, old, new):
        """What becomes of the moments when the basis `old` [r, in] is replaced by `new`."""
        if how == "rotate":
            self.m, self.v = rotated(self.m, self.v, old @ new.T, self.betas, self.count)
        elif how == "zero":
            self.m, self.v = torch.zeros_like(self.m), torch.zeros_like(self.v)
        else:
            assert how == "carry"


def rotated(m, v, turn, betas, count):
    """LDAdam's rule (arXiv 2410.16103): m and v of [out, r] in the basis that `turn` = Q_old·Q_newᵀ leads to."""
    of_m, of_v = 1 - betas[0] ** count, 1 - betas[1] ** count
    mean, square = m / of_m, v / of_v
    variance = (square - mean**2) @ turn**2
    return m @ turn, of_v * (variance + (mean @ turn) ** 2).abs()


class GaLore:
    """The released algorithm: the refresh's own gradient gives the basis; decay by the whole W, after the update."""

    def __init__(self, weight, *, r, T, lr, alpha, side="right", weight_decay=0.0, basis=right_basis, **adam):
        self.weight, self.r, self.T, self.lr, self.alpha = weight.clone(), r, T, lr, alpha
        self.left, self.decay, self.basis, self.adam = side == "left", weight_decay, basis, adam
        self.count, self.bases = 0, {}

    def step(self, gradient):
        if self.left:
            gradient = gradient.T
        if self.count % self.T == 0:
            self.Q = self._new_basis(gradient)
            self.bases[self.count] = self.Q
        projected = gradient @ self.Q.T
        if self.count == 0:
            self.moments = Adam(projected.shape, projected.dtype, **self.adam)
        update = self.alpha * self.moments.step(projected) @ self.Q
        self.weight = self.weight - self.lr * (update.T if self.left else update)
        self.weight = self.weight - self.lr * self.decay * self.weight
        self.count += 1

    def _new_basis(self, gradient):
        if self.left and self.basis is right_basis:  # signs are those of U, which is V of the transposed matrix
            return canonical_svd(gradient.T)[0][:, : self.r].T
        return self.basis(gradient, self.r)


class Chain:
    """`W + s·C·Q`: only C trains; `refresh` merges, takes the next Q and puts C to 0.

    Decoupled decay acts on the whole weight: on C in every step, on W as the factor `rho`, until the merge.
    lr: of C. decay_after: whether the decay follows the update, as in GaLore, or comes before it, as in AdamW.
    """

    def __init__(self, weight, Q, *, lr, scaling, weight_decay=0.0, decay_after=False, moments="carry", **adam):
        self.W, self.Q, self.s, self.lr, self.rho = weight.clone(), Q, scaling, lr, 1.0
        self.decay, self.decay_after, self.how = weight_decay, decay_after, moments
        self.C = torch.zeros(weight.shape[0], Q.shape[0], dtype=weight.dtype)
        self.moments = Adam(self.C.shape, self.C.dtype, **adam)

    @property
    def weight(self):
        return self.rho * self.W + self.s * self.C @ self.Q

    def gradient(self, of_weight):
        """C's gradient, of [out, r], for the gradient of the whole weight."""
        return self.s * of_weight @ self.Q.T

    def step(self, gradient, decay_lr=None, lr=None):
        """Update C with its own gradient. decay_lr: the learning rate of the decay (default: the step's)."""
        lr = self.lr if lr is None else lr
        keeps = 1 - (lr if decay_lr is None else decay_lr) * self.decay
        update = lr * self.moments.step(gradient)
        self.C = keeps * (self.C - update) if self.decay_after else keeps * self.C - update
        self.rho *= keeps

    def refresh(self, Q):
        self.W, self.rho = self.weight, 1.0
        self.moments.refresh(self.how, self.Q, Q)
        self.Q, self.C = Q, torch.zeros_like(self.C)
