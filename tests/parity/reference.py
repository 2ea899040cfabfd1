"""ReLoRA in plain single-process PyTorch, for comparison. Imports nothing of relora_ds.

The model comes in as the wrapped one's parameters: `W`, `A`, `B` are found by name. Everything that is
under test (forward through A and B, merge, reinitialisation, pruning, Adam, clipping, schedule) is done
here again, in the most literal way.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class ReferenceLinear(nn.Module):
    """`y = ρ x Wᵀ + b + s (x Aᵀ) Bᵀ`, three plain matmuls; ρ is what weight decay has left of W in this cycle."""

    left = 1.0

    def __init__(self, linear, r, scaling):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.lora_A = nn.Parameter(torch.zeros(r, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.scaling = scaling

    def forward(self, x):
        dense = self.left * F.linear(x, self.weight) + (0 if self.bias is None else self.bias)
        return dense + self.scaling * (x @ self.lora_A.t()) @ self.lora_B.t()


class ReferenceConv1D(ReferenceLinear):
    """The same with a weight `[in, out]`, as GPT-2 keeps it."""

    def __init__(self, conv1d, r, scaling):
        linear = nn.Linear(*conv1d.weight.shape)
        linear.bias.data.copy_(conv1d.bias)
        super().__init__(linear, r, scaling)
        self.weight = nn.Parameter(conv1d.weight.detach().clone(), requires_grad=False)

    def forward(self, x):
        return self.left * (x @ self.weight) + self.bias + self.scaling * (x @ self.lora_A.t()) @ self.lora_B.t()


class ReferenceStack(nn.Module):
    """One matrix `[out, in]` for each expert, with a pair of factors each."""

    left = 1.0

    def __init__(self, parameter, r, scaling):
        super().__init__()
        experts, rows, columns = parameter.shape
        self.weight = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        self.lora_A = nn.Parameter(torch.zeros(experts, r, columns))
        self.lora_B = nn.Parameter(torch.zeros(experts, rows, r))
        self.scaling = scaling

    def forward(self, x, expert):
        update = (x @ self.lora_A[expert].t()) @ self.lora_B[expert].t()
        return self.left * F.linear(x, self.weight[expert]) + self.scaling * update


class ReferenceExperts(nn.Module):
    """Mixtral's experts: every expert on every token, and the weights of those that were not chosen are 0."""

    def __init__(self, experts, r, scaling):
        super().__init__()
        self.gate_up_proj = ReferenceStack(experts.gate_up_proj, r, scaling)
        self.down_proj = ReferenceStack(experts.down_proj, r, scaling)

    def forward(self, x, chosen, weights):
        result = torch.zeros_like(x)
        for expert in range(len(self.gate_up_proj.weight)):
            gate, up = self.gate_up_proj(x, expert).chunk(2, dim=-1)
            weight = (weights * (chosen == expert)).sum(-1, keepdim=True)
            result = result + weight * self.down_proj(F.silu(gate) * up, expert)
        return result


class Reference:
    """Trains on the concatenated batch of all ranks; `new_A(name, restart_number)` supplies the drawn values."""

    def __init__(
        self,
        model,
        r,
        scaling,
        new_A,
        lr,
        weight_decay,
        max_grad_norm,
        schedule,
        reset,
        reset_ratio,
        betas=(0.9, 0.999),
        eps=1e-8,
        one_sided=False,
    ):
        self.model, self.new_A, self.schedule = model, new_A, schedule
        self.lr, self.max_grad_norm, self.reset, self.reset_ratio = lr, max_grad_norm, reset, reset_ratio
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            kind = {"Conv1D": ReferenceConv1D, "MixtralExperts": ReferenceExperts}.get(type(module).__name__)
            if isinstance(module, nn.Linear) and module is not head:
                kind = ReferenceLinear
            if kind is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, kind(module, r, scaling))
        kinds = (ReferenceLinear, ReferenceStack)
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
        for name, layer in self.layers.items():
            layer.lora_A.data.copy_(new_A(name, 0))
            layer.lora_A.requires_grad_(not one_sided)
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.weight_decay, self.left = weight_decay, 1.0
        decayed = [p for n, p in trainable if p.ndim >= 2 and "lora_A" not in n]  # of B·A one factor, and W below
        plain = [p for n, p in trainable if p.ndim < 2 or "lora_A" in n]
        self.adam = torch.optim.AdamW(
            [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)],
            lr=lr,
            betas=betas,
            eps=eps,
        )
        self.parameters = [p for _, p in trainable]
        self.t = self.restarts = 0

    def step(self, tokens, num_micro_batches=1):
        """One optimizer step; returns the loss before it."""
        loss_sum = 0.0
        for micro in tokens.chunk(num_micro_batches):
            logits = self.model(input_ids=micro).logits
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), micro[:, 1:].reshape(-1))
            (loss / num_micro_batches).backward()
            loss_sum += loss.item() / num_micro_batches
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * self.schedule(self.t)
        self.left *= 1 - self.lr * self.schedule(self.t) * self.weight_decay
        for layer in self.layers.values():  # by a number that is rounded nowhere: W rounded anew is another path
            layer.left = self.left
        self.adam.step()
        self.adam.zero_grad()
        self.t += 1
        return loss_sum

    @torch.no_grad()
    def restart(self):
        self.restarts += 1
        for name, layer in self.layers.items():
            update = layer.scaling * layer.lora_B @ layer.lora_A
            layer.weight *= layer.left
            self.left = layer.left = 1.0
            layer.weight += update.t() if isinstance(layer, ReferenceConv1D) else update
            old_A = layer.lora_A.clone()
            layer.lora_A.copy_(self.new_A(name, self.restarts))
            layer.lora_B.zero_()
            for factor in (layer.lora_A, layer.lora_B):
                if not factor.requires_grad:
                    continue
                state = self.adam.state[factor]
                if self.reset == "rotate":
                    rotate(state, old_A @ layer.lora_A.mT, *self.adam.defaults["betas"])
                else:
                    prune(state["exp_avg"], state["exp_avg_sq"], self.reset, self.reset_ratio)


def prune(m, v, reset, ratio):
    """Prune whole-tensor moments in place, by sorting."""

    def largest(x):
        keep = x.numel() - round(ratio * x.numel())
        order = torch.argsort(x.abs().flatten(), descending=True, stable=True)[:keep]
        mask = torch.zeros(x.numel(), dtype=torch.bool)
        mask[order] = True
        return mask.view_as(x)

    if reset == "zero":
        m.zero_(), v.zero_()
    elif reset == "magnitude_joint":
        mask = largest(m)
        m.mul_(mask), v.mul_(mask)
    elif reset == "magnitude":
        mask_m, mask_v = largest(m), largest(v)
        m.mul_(mask_m), v.mul_(mask_v)
    else:
        assert reset == "none"


def rotate(state, turn, beta1, beta2):
    """Turn whole moments in place, in fp64, row by row of B: LDAdam's rule (arXiv 2410.16103)."""
    m, v, turn = state["exp_avg"], state["exp_avg_sq"], turn.double()
    mean, second = m.double() / (1 - beta1 ** state["step"].item()), v.double() / (1 - beta2 ** state["step"].item())
    turned = (((second - mean**2) @ turn**2) + (mean @ turn) ** 2).abs() * (1 - beta2 ** state["step"].item())
    m.copy_(m.double() @ turn), v.copy_(turned)


def jagged_cosine(total, warmup, every, rewarm, minimum):
    """The schedule, written down from the definition."""

    def cosine(k):
        return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, (k - warmup) / (total - warmup))))

    def multiplier(k):
        if k < warmup:
            return k / warmup
        last = k // every * every
        if last > 0 and k - last < rewarm:
            return (k - last) / rewarm * cosine(last + rewarm)
        return cosine(k)

    return multiplier
