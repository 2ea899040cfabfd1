"""CoLA (arXiv 2502.10940): a LLaMA whose attention and feed-forward linears are `y = B·silu(A·x)`, without a W.

This file imports transformers and torch alone. `save_pretrained` copies it beside the weights, so that an exported
model loads where relora_ds is not installed: `AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel


class ReLoRACoLAConfig(LlamaConfig):
    """A LLaMA's, and the rank. `hidden_act: linear` leaves the activations between A and B as the only ones.

    Attributes:
        cola_r: the rank r of every projection.
    """

    model_type = "relora_cola"
    base_model_tp_plan = {}  # LLaMA's cuts weights that are not here
    _auto_class = "AutoConfig"

    cola_r: int = 128


class CoLALinear(nn.Module):
    """`y = B·silu(A·x) + b`.

    Attributes:
        A: `[r, in]`.
        B: `[out, r]`.
        bias: `[out]` or None.
    """

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, r: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.A = nn.Parameter(torch.empty(r, in_features))
        self.B = nn.Parameter(torch.empty(out_features, r))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @property
    def std(self) -> float:
        """The standard deviation that A and B begin with."""
        return self.r**-0.25 * (self.in_features + self.out_features) ** -0.25

    def extra_repr(self) -> str:
        """Return the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}"

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` for `[..., in]`."""
        return F.linear(F.silu(F.linear(x, self.A)), self.B, self.bias)


class ReLoRACoLAModel(LlamaModel):
    """The decoder."""

    config_class = ReLoRACoLAConfig

    def __init__(self, config: ReLoRACoLAConfig):
        super().__init__(config)
        for layer in self.layers:
            for name, linear in list(layer.named_modules()):
                if isinstance(linear, nn.Linear):
                    bias = linear.bias is not None
                    factors = CoLALinear(linear.in_features, linear.out_features, config.cola_r, bias)
                    layer.set_submodule(name, factors)
        self.post_init()  # a second time: gives the factors their first values

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CoLALinear):
            nn.init.normal_(module.A, std=module.std)
            nn.init.normal_(module.B, std=module.std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ReLoRACoLAForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = ReLoRACoLAConfig
    _auto_class = "AutoModelForCausalLM"  # type: ignore[assignment]  # declared as None

    def __init__(self, config: ReLoRACoLAConfig):
        super(LlamaForCausalLM, self).__init__(config)  # its own would build a LLaMA first
        self.model = ReLoRACoLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
