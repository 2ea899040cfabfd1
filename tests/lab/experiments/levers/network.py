"""The network of the scale `tiny` as one function of its parameters, and its data."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from relora_ds.config import load_recipe
from relora_ds.data import prepare
from relora_ds.data.loader import TrainLoader, evaluation_batches
from relora_ds.models.build import build_config, build_model

RECIPE = load_recipe("tiny_full")
DATA = RECIPE.data
SEQ_LEN = DATA.seq_len


class Network:
    """A LLaMA whose parameters are leaves with gradients, by the names that they have in transformers."""

    def __init__(self, seed: int):
        self.config = build_config(RECIPE.model, DATA.vocab_size, SEQ_LEN)
        model = build_model(self.config, RECIPE.model, seed)
        self.parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.rotation = _rotation(self.config.hidden_size // self.config.num_attention_heads)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss over the labels, which are shifted here. ids, labels: `[rows, tokens]`."""
        config, weights = self.config, self.parameters
        x = F.embedding(ids, weights["model.embed_tokens.weight"])
        for number in range(config.num_hidden_layers):
            layer = {
                name.removeprefix(prefix): value
                for name, value in weights.items()
                if name.startswith(prefix := f"model.layers.{number}.")
            }
            x = x + self._attention(self._norm(x, layer["input_layernorm.weight"]), layer)
            h = self._norm(x, layer["post_attention_layernorm.weight"])
            gate, up = (F.linear(h, layer[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, layer["mlp.down_proj.weight"])
        x = self._norm(x, weights["model.norm.weight"])
        logits = F.linear(x[:, :-1], weights["lm_head.weight"]).flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten())

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attention(self, h: Tensor, layer: dict[str, Tensor]) -> Tensor:
        rows, tokens, width = h.shape
        split = (rows, tokens, self.config.num_attention_heads, -1)
        q, k, v = (F.linear(h, layer[f"self_attn.{name}_proj.weight"]).view(split).transpose(1, 2) for name in "qkv")
        q, k = self._rotated(q), self._rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, tokens, width)
        return F.linear(mixed, layer["self_attn.o_proj.weight"])

    def _rotated(self, x: Tensor) -> Tensor:
        cos, sin = (table[: x.shape[2]] for table in self.rotation)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def _rotation(width: int) -> tuple[Tensor, Tensor]:
    frequencies = 1 / 10_000 ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(SEQ_LEN).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def batches(seed: int) -> Iterator[Tensor]:
    """Yield `[rows, tokens]` of one optimizer step after the other, in the order in which the product trains."""
    rows = RECIPE.train.batch_sequences
    loader = TrainLoader(prepare(DATA).train, SEQ_LEN, rows, rows, 0, 1, seed)
    while True:
        yield loader.next_step()[0]["input_ids"]


@torch.no_grad()
def validation_loss(network: Network) -> float:
    """Return the mean loss over all validation tokens."""
    total, count = 0.0, 0
    for batch in evaluation_batches(prepare(DATA).validation, SEQ_LEN, 64, 0, 1):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(network.loss(batch["input_ids"], batch["labels"])) * tokens
        count += tokens
    return total / count
