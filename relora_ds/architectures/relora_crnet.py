"""CR-Net (Kong et al., ICLR 2026): a LLaMA whose linears add a low-rank product to the layer before's output.

For each of q, k, v, o, gate, up and down: `Y_1 = W·X_1` in the first layer, `Y_l = f(β_l)·Y_{l-1} + B_l·A_l·X_l` in the
others, with `f(β) = sign(β)·(|β| + 1e-6)`. What a layer gives to the next is `(hidden states, the seven Y)`; the last
one gives hidden states alone. The Y are carried in fp32 in every precision: they are sums over all layers so far.

This file imports transformers and torch alone. `save_pretrained` copies it beside the weights, so that an exported
model loads where relora_ds is not installed: `AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

EPSILON = 1e-6
# Y_{l-1}, or what gives it from B·A·X and f(β): a recomputation has Y_l instead.
Before: TypeAlias = Tensor | Callable[[Tensor, Tensor], Tensor]


class ReLoRACRNetConfig(LlamaConfig):
    """A LLaMA's, and the rank.

    Attributes:
        crnet_r: the rank r of every product B·A.
        crnet_beta: the value that every β begins with.
    """

    model_type = "relora_crnet"
    base_model_tp_plan = {}  # LLaMA's cuts weights that are not here
    _auto_class = "AutoConfig"

    crnet_r: int = 96
    crnet_beta: float = 1.0


def scale(beta: Tensor) -> Tensor:
    """Return `f(β)`, whose derivative is 1: at β = 0, where a sign would be 0, it is 1e-6."""
    return beta + torch.where(beta < 0, -EPSILON, EPSILON)


class CRNetLinear(nn.Module):
    """`Y_l = f(β)·Y_{l-1} + B·A·x + b`.

    Attributes:
        A: `[r, in]`.
        B: `[out, r]`.
        beta: `[1]`.
        bias: `[out]` or None.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, r: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, r))
        self.beta = nn.Parameter(torch.empty(1))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @property
    def std(self) -> float:
        """The standard deviation that A and B begin with: CoLA's, with which B·A·x is as large as an ordinary y."""
        return self.r**-0.25 * (self.in_features + self.out_features) ** -0.25

    def extra_repr(self) -> str:
        """Return the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"

    def forward(self, x: Tensor, before: Before) -> Tensor:
        """Return `Y_l`, `[..., out]` in fp32 or wider, for `[..., in]`."""
        change, factor = _wide(F.linear(F.linear(x, self.A), self.B, self.bias)), scale(_wide(self.beta))
        if not isinstance(before, Tensor):
            before = before(change, factor)
        return factor * before + change


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _project(linear: nn.Module, x: Tensor, before: Before | None) -> tuple[Tensor, Tensor]:
    """Return (the output in the precision of `x`, the Y to carry)."""
    y = _wide(linear(x)) if before is None else linear(x, before)
    return y.to(x.dtype), y


class ReLoRACRNetAttention(LlamaAttention):
    """LLaMA's attention, which gets the four Y of the layer before, and gives its own."""

    def forward(
        self,
        hidden_states: Tensor,
        before: Sequence[Before | None],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return (the output, the attention weights, Y of q, k, v and o)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        inner = zip((self.q_proj, self.k_proj, self.v_proj), before, strict=False)
        projected, carried = zip(*(_project(linear, hidden_states, y) for linear, y in inner), strict=True)
        query, key, value = (each.view(shape).transpose(1, 2) for each in projected)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))  # the name depends on transformers' version
        if cache is not None:  # of keys and values: the Y of earlier positions are not needed
            key, value = cache.update(key, value, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output, y = _project(self.o_proj, output.reshape(*shape[:-2], -1).contiguous(), before[3])
        return output, weights, [*carried, y]


class ReLoRACRNetMLP(LlamaMLP):
    """LLaMA's feed-forward, which gets the three Y of the layer before, and gives its own."""

    def forward(  # type: ignore[override]  # LLaMA's gets and gives a tensor
        self, x: Tensor, before: Sequence[Before | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (the output, Y of gate, up and down)."""
        gate, y_gate = _project(self.gate_proj, x, before[0])
        up, y_up = _project(self.up_proj, x, before[1])
        output, y_down = _project(self.down_proj, self.act_fn(gate) * up, before[2])
        return output, [y_gate, y_up, y_down]


class ReLoRACRNetLayer(LlamaDecoderLayer):
    """One layer: the first has weights, the others have factors."""

    def __init__(self, config: ReLoRACRNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = ReLoRACRNetAttention(config, layer_idx)
        self.mlp = ReLoRACRNetMLP(config)
        self.is_last = layer_idx == config.num_hidden_layers - 1
        for name, linear in list(self.named_modules()) if layer_idx else []:
            if isinstance(linear, nn.Linear):
                bias = linear.bias is not None
                self.set_submodule(name, CRNetLinear(linear.in_features, linear.out_features, config.crnet_r, bias))

    def forward(
        self, hidden_states: Tensor | tuple[Tensor, Sequence[Before]], **kwargs
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return `(hidden states, the seven Y)` for the same of the layer before; the last layer, hidden states alone.

        hidden_states: the first layer's are the embeddings alone.
        """
        before: Sequence[Before | None]
        x, before = (hidden_states, [None] * 7) if isinstance(hidden_states, Tensor) else hidden_states
        output, _, inner = self.self_attn(self.input_layernorm(x), before[:4], **kwargs)
        x = x + output
        output, outer = self.mlp(self.post_attention_layernorm(x), before[4:])
        x = x + output
        return x if self.is_last else (x, [*inner, *outer])


class ReLoRACRNetModel(LlamaModel):
    """The decoder."""

    config_class = ReLoRACRNetConfig
    _no_split_modules = ["ReLoRACRNetLayer"]

    def __init__(self, config: ReLoRACRNetConfig):
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers):
            self.layers[layer_idx] = ReLoRACRNetLayer(config, layer_idx)
        self.post_init()  # a second time: gives the factors their first values

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CRNetLinear):
            nn.init.normal_(module.A, std=module.std)
            nn.init.normal_(module.B, std=module.std)
            nn.init.constant_(module.beta, self.config.crnet_beta)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ReLoRACRNetForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = ReLoRACRNetConfig
    _no_split_modules = ["ReLoRACRNetLayer"]
    _auto_class = "AutoModelForCausalLM"  # type: ignore[assignment]  # declared as None

    def __init__(self, config: ReLoRACRNetConfig):
        super(LlamaForCausalLM, self).__init__(config)  # its own would build a LLaMA first
        self.model = ReLoRACRNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
