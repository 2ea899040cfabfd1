"""The low-rank phase: `ReLoRAConfig`, which is the `relora` section of a recipe and a public class of its own."""

import math
from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from typing import Annotated, Literal, get_args

from relora_ds.config import fields
from relora_ds.config.rules import MAX_COUNT, Integer, Names, Number, either, is_int, nearest_multiples, tenth

OptimizerReset = Literal["magnitude_joint", "magnitude", "random", "zero", "none", "rotate"]
RestartInit = Literal["kaiming", "gradient", "random"]
GradientEstimate = Literal["sketch", "warm_sketch", "exact"]
Product = Literal["auto", "folded", "separate"]
FrozenDtype = Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4", "fp8"]
FROZEN_DTYPES: tuple[str, ...] = get_args(FrozenDtype)


@dataclass(kw_only=True)
class ReLoRAConfig:
    """The low-rank phase: `W + s·B·A`, merged and restarted every `restart_every` steps (arXiv 2307.05695, sec. 3).

    Raises:
        ValueError: every value that is wrong, one line each.
    """

    r: Annotated[int, Integer(1)] = 128
    """Rank of the low-rank updates, as in PEFT."""
    lora_alpha: Annotated[float, Number("above 0")] = 32.0
    """Numerator of the scaling `s = lora_alpha / r`, as in PEFT."""
    lora_dropout: Annotated[float, Number("inside [0, 1)")] = 0.0
    """Dropout on the input of A, as in PEFT."""
    trains: Literal["both", "B", "none"] = "both"
    """Which factors train. `B` alone makes a one-sided chain, as GaLore's: A is an orthonormal basis that stays for a
    cycle, without optimizer state and without traffic. With `none` there are no factors: the owner of each weight
    updates it from its whole gradient, by the `matrix_optimizer` that `relora_ds.initialize` gets."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead, as in PEFT."""
    target_modules: Annotated[str | list[str], Names("all-linear or [q_proj, v_proj]", expression=True)] = "all-linear"
    """Linear layers that become low-rank: `all-linear` (all but the output head), a list of module names or name
    suffixes, or a regular expression that a whole module name matches. As in PEFT. With `trains: none` also the head
    and embeddings may be named; `all-matrices` is all linears and the input embedding."""
    exclude_modules: Annotated[str | list[str] | None, Names("[dt_proj, shared_expert_gate]", expression=True)] = None
    """What to leave out of `target_modules`: a list of names or suffixes, or a regular expression. As in PEFT."""
    target_parameters: Annotated[
        list[str] | None, Names("[experts.gate_up_proj, experts.down_proj], or null for none")
    ] = None
    """Names or name suffixes of parameters that become low-rank without being a linear's weight, such as the 3-D
    weights of a mixture of experts. As in PEFT."""
    trainable_modules: Annotated[
        list[str] | None, Names("[embed_tokens, lm_head, norm], or null for embeddings, head and norms")
    ] = None
    """What trains at full rank beside A and B; null = embeddings, output head and norms. PEFT's `modules_to_save` is
    another name of it."""
    restart_every: Annotated[int | None, Integer(2, example=5000)] = None
    """Applied optimizer steps between restarts; null = never (LoRA on a frozen W)."""
    restart_warmup_steps: Annotated[int, Integer(0)] = 100
    """Steps of the linear warm-up of the learning rate after a restart."""
    optimizer_reset: OptimizerReset = "magnitude_joint"
    """What happens to Adam's moments of A and B at a restart. `magnitude_joint` keeps the largest `1 - reset_ratio` of
    |exp_avg| and applies that one mask to both moments; `magnitude` prunes each by its own; `random` keeps a random
    part; `zero` keeps nothing, `none` everything; `rotate` (of a one-sided chain) expresses them in the new basis, as
    LDAdam does."""
    reset_ratio: Annotated[float, Number("inside [0, 1)")] = 0.99
    """Part of the moments that a restart sets to zero."""
    restart_init: RestartInit = "kaiming"
    """What A becomes at a restart: `kaiming` noise (the paper's), a `random` orthonormal basis, or `gradient`, a basis
    of the dominant row space of W's gradient in the step before."""
    gradient_estimate: GradientEstimate = "sketch"
    """From what `restart_init: gradient` computes the basis: a random `sketch` of the gradient; `warm_sketch`, along
    the directions of B's first moment and a few random ones; or the `exact` gradient, gathered layer by layer in host
    memory."""
    residual_every: Annotated[int | None, Integer(1, example=20)] = None
    """Applied optimizer steps between updates of W by what a one-sided chain leaves out of its gradient: each rank adds
    it up in fp32 on its device, and the owners of the weights get the sum, orthogonalise it as Muon does and apply it.
    null = never."""
    residual_lr: Annotated[float, Number("above 0")] = 0.08
    """Peak learning rate of these updates; it follows the curve of `optim.lr`."""
    product: Product = "auto"
    """How a linear multiplies: `separate` with W, and with A and B beside it; `folded` with `W + s·B·A`, formed anew in
    forward and in backward; `auto` = folded where a micro-batch has enough tokens to make that faster."""
    frozen_dtype: FrozenDtype = "auto"
    """How W is stored; `auto` = the precision of the run."""
    frozen_double_quant: bool = False
    """Store the scales of nf4 in 8 bits too."""
    frozen_master: Literal["cpu", "device", "none"] = "cpu"
    """Where the fp32 masters of W live when W is stored below fp32, spread over the ranks; `none` = what a merge rounds
    away is lost."""
    frozen_placement: Literal["auto", "replicated", "sharded"] = "auto"
    """Whether ZeRO-3 shards W; `auto` = replicated at stages 0 to 2, sharded at 3."""
    modules_to_save: InitVar[list[str] | None] = None

    def __post_init__(self, modules_to_save: list[str] | None) -> None:
        if modules_to_save is not None:
            if self.trainable_modules not in (None, modules_to_save):
                raise ValueError(
                    f"ReLoRAConfig.modules_to_save: {modules_to_save} and trainable_modules: {self.trainable_modules} "
                    "are two names of one setting; give one of them"
                )
            self.trainable_modules = modules_to_save
        for name in ("target_modules", "exclude_modules", "target_parameters", "trainable_modules"):
            if isinstance(value := getattr(self, name), (tuple, set, frozenset)):  # PEFT takes these; JSON has lists
                setattr(self, name, sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value))
        if found := self.problems("ReLoRAConfig."):
            raise ValueError("\n".join(found))

    @property
    def scaling(self) -> float:
        """`s` of `W + s·B·A`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def problems(self, prefix: str = "relora.") -> list[str]:
        """Return what is wrong with the values, one message each; [] when usable. prefix: of the names in messages."""
        return [*fields.problems(self, prefix), *self.conflicts(prefix)]

    def conflicts(self, prefix: str) -> Iterator[str]:
        """Yield a message for values that do not go together."""
        if self.trains == "none":
            for name in ("restart_every", "residual_every", "lora_dropout"):
                if value := getattr(self, name):
                    yield f"{prefix}{name}: {value} has no factors to act on with {prefix}trains none; leave it out"
        else:
            yield from self._conflicts_of_factors(prefix)
        if self.target_modules == [] and not self.target_parameters:
            yield (
                f"{prefix}target_modules: [] names nothing, and {prefix}target_parameters is not set; use e.g. "
                "all-linear or [q_proj, v_proj]"
            )

    def _conflicts_of_factors(self, prefix: str) -> Iterator[str]:
        every, ramp = self.restart_every, self.restart_warmup_steps
        if is_int(every) and is_int(ramp) and 1 <= every <= ramp:
            yield (
                f"{prefix}restart_every: {every} is not above {prefix}restart_warmup_steps {ramp}, so the learning "
                f"rate would never recover; use e.g. {prefix}restart_warmup_steps={tenth(every)}"
            )
        if self.trains == "B" and self.restart_init == "kaiming":
            yield (
                f"{prefix}trains: B needs an orthonormal A, and {prefix}restart_init kaiming is none; use "
                f"{prefix}restart_init=gradient or {prefix}restart_init=random"
            )
        if self.optimizer_reset == "rotate" and self.trains != "B":
            yield (
                f"{prefix}optimizer_reset: rotate turns B's moments from one frozen basis to the next, and with "
                f"{prefix}trains {self.trains} A is none; use {prefix}trains=B, or "
                f"{prefix}optimizer_reset=magnitude_joint"
            )
        if self.restart_init == "gradient" and self.lora_dropout:
            yield (
                f"{prefix}restart_init: gradient needs the layer's own input, and {prefix}lora_dropout "
                f"{self.lora_dropout} hides it; use {prefix}lora_dropout=0"
            )
        yield from self._residual_conflicts(prefix)

    def _residual_conflicts(self, prefix: str) -> Iterator[str]:
        residual, restart = self.residual_every, self.restart_every
        if not is_int(residual) or not 1 <= residual <= MAX_COUNT:  # null, or no number of steps
            return
        if self.trains != "B":
            yield (
                f"{prefix}residual_every: {residual} is for what a one-sided chain leaves out of the gradient; with "
                f"{prefix}trains {self.trains} there is none; use {prefix}trains=B, or {prefix}residual_every=null"
            )
        if self.lora_dropout:
            yield (
                f"{prefix}residual_every: {residual} needs the layer's own input, and {prefix}lora_dropout "
                f"{self.lora_dropout} hides it; use {prefix}lora_dropout=0"
            )
        if is_int(restart) and restart % residual:
            near = nearest_multiples(restart, residual)
            yield (
                f"{prefix}restart_every: {restart} is not a multiple of {prefix}residual_every {residual}, so the "
                f"basis would change within a period; use {either(f'{prefix}restart_every', near)}"
            )
