"""Sections of the methods whose update of a weight needs its whole gradient. The rules are in `relora_ds.matrix`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from relora_ds.config.rules import Integer, Number


@dataclass(kw_only=True)
class FiraConfig:
    """Method `fira` only; its rank is `relora.r`."""

    alpha: Annotated[float, Number("above 0")] = 0.25
    """Multiplies the update inside of the subspace, as GaLore's scale."""
    update_proj_gap: Annotated[int, Integer(1)] = 200
    """Steps between two bases."""
    variant: Literal["code", "paper"] = "code"
    """What is left out of the subspace: as the authors' release scales it (`code`), or as their algorithm does
    (`paper`)."""


@dataclass(kw_only=True)
class ApolloConfig:
    """Methods `apollo` and `apollo_mini`; their rank is `relora.r`."""

    scale_type: Literal["channel", "tensor"] = "channel"
    """What has a factor of its own: a row of the longer side, or the matrix."""
    scale: Annotated[float, Number("above 0")] = 1.0
    """Its root multiplies the update."""
    scale_front: bool = False
    """Multiply before the growth of the update is limited, instead of after."""
    update_proj_gap: Annotated[int, Integer(1)] = 200
    """Steps between two random projections."""
    limits: bool = True
    """Limit the growth of an update's norm to 1 % a step."""


@dataclass(kw_only=True)
class ScaleConfig:
    """Method `scale` only."""

    momentum: Annotated[float, Number("inside [0, 1)")] = 0.9
    """Decay of the mean gradient of the output head, which alone has one."""


@dataclass(kw_only=True)
class MuonConfig:
    """Method `muon` only."""

    momentum: Annotated[float, Number("inside [0, 1)")] = 0.95
    """Decay of the mean gradient."""
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the learning rate depends on the shape. `match_rms_adamw`: times `0.2 · √max(out, in)`, so that entries move
    as far as AdamW moves them (arXiv 2502.16982); `original`: times `√max(1, out/in)`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products that orthogonalise. Published implementations have `bf16`, which GPUs multiply several times as
    fast; updates differ by a few per cent then. Momentum and masters are fp32."""


@dataclass(kw_only=True)
class SSTConfig:
    """Method `sst` only; its rank is `relora.r`: the triplets of singular vectors and value that train at a time."""

    iteration_steps: Annotated[int, Integer(1)] = 200
    """Steps for which the same singular vectors train. After `p / r` such iterations, p the smaller side of the weight,
    it is decomposed anew."""
    iteration_warmup_steps: Annotated[int, Integer(0)] = 20
    """Steps of the linear warm-up of the weights' learning rate in each iteration."""
