"""ReLoRA (arXiv 2307.05695): low-rank updates, merged and restarted."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from relora_ds.methods.lowrank import LowRank

if TYPE_CHECKING:
    from relora_ds.zero.engine import ReLoRAEngine


class ReLoRA(LowRank):
    """`W + s·B·A` with W frozen; every `relora.restart_every` steps B·A is merged into W and starts anew."""

    name = "relora"
    is_chain = True

    def recipe_warnings(self) -> Iterator[str]:
        """Yield why a run is not what it looks like."""
        relora = self.relora
        if relora.restart_every is None:
            yield "relora.restart_every: null means no restart: this run is LoRA on a frozen W"
        elif not self.num_restarts:
            yield (
                f"relora.restart_every: {relora.restart_every} is not below the {self.low_rank_steps} low-rank steps: "
                "the run has no restart"
            )
        if relora.optimizer_reset == "magnitude":
            yield (
                "relora.optimizer_reset: magnitude prunes the two moments by different masks, which can take steps of "
                "exp_avg/eps after a restart; for reproduction only, use magnitude_joint"
            )
        if relora.optimizer_reset in ("zero", "none", "rotate") and relora.reset_ratio != type(relora).reset_ratio:
            yield (
                f"relora.reset_ratio: {relora.reset_ratio} has no effect with optimizer_reset {relora.optimizer_reset}"
            )

        if relora.restart_init != "gradient" and relora.gradient_estimate != type(relora).gradient_estimate:
            yield (
                f"relora.gradient_estimate: {relora.gradient_estimate} has no effect with restart_init "
                f"{relora.restart_init}"
            )

        if relora.residual_every is None and relora.residual_lr != type(relora).residual_lr:
            yield f"relora.residual_lr: {relora.residual_lr} has no effect without relora.residual_every"

    def after_step(self, engine: "ReLoRAEngine") -> None:
        """Restart when the schedule says so."""
        engine.restart_if_due()
