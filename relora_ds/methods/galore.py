"""GaLore (arXiv 2403.03507), as a chain of one-sided low-rank updates.

GaLore projects the gradient of W on a basis Q, `R = G·Qᵀ`, runs Adam on R, and adds `lr·α·N·Q` to W; every T steps
Q becomes the dominant row space of the gradient. This is Adam on the B of `W + s·B·A` with A = Q and s = α, which is
merged every T steps: the same numbers, but no optimizer ever needs a whole gradient, so that it works on every ZeRO
stage. GaLore's α is `lora_alpha / r`, its T `restart_every`. Its basis is that of the last step of a cycle, not of the
first of the next.
"""

from collections.abc import Iterator
from types import MappingProxyType

from relora_ds.methods.relora import ReLoRA


class GaLore(ReLoRA):
    """A name for settings of `relora`: what trains, the basis, Adam's moments, and no ramp of the learning rate."""

    name = "galore"
    defaults = MappingProxyType(
        {
            "relora.trains": "B",
            "relora.restart_every": 200,
            "relora.restart_warmup_steps": 0,
            "relora.restart_init": "gradient",
            "relora.optimizer_reset": "none",
        }
    )

    def recipe_problems(self) -> Iterator[str]:
        """Yield what would make it another method."""
        yield from super().recipe_problems()
        if self.relora.trains == "both":
            yield f"relora.trains: {self.relora.trains} is not GaLore, which trains B; use trains=B, or method=relora"
