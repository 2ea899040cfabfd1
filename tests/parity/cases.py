"""What runs on the ranks in the parity and restart tests, on the engine's device; what they return is on the CPU."""

import torch
import torch.distributed as dist

import relora_ds
from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.base_layer import initial_A
from relora_ds.lowrank.reinit import random_basis
from relora_ds.lowrank.wrap import owned_layers
from relora_ds.zero.teardown import release as release_engine
from tests.parity.reference import Reference, jagged_cosine
from tests.small_models import FAMILIES, batch

GLOBAL_BATCH, STEPS, EVERY, REWARM, WARMUP, MIN_RATIO, LR, DECAY, CLIP = 24, 54, 11, 3, 4, 0.1, 1e-2, 0.1, 0.5
SCALING = 2.0


def relora_config(**changes) -> ReLoRAConfig:
    return ReLoRAConfig(
        **{
            **dict(
                r=4,
                lora_alpha=8,
                restart_every=EVERY,
                restart_warmup_steps=REWARM,
                optimizer_reset="magnitude_joint",
                reset_ratio=0.9,
                product="separate",  # as the reference multiplies
            ),
            **changes,
        }
    )


EXPERTS = {
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "trainable_modules": ["embeddings", "head", "norms", "gate"],
}


def family_config(family: str, **changes) -> ReLoRAConfig:
    """`relora_config` with what a family needs: experts are named, and a router trains as a whole."""
    if family == "mixtral":
        changes = {**EXPERTS, **changes}
    return relora_config(**changes)


def ds_settings(stage: int, precision: str, offload: bool = False, **zero) -> dict:
    section = {"stage": stage, **zero}
    if offload:
        section["offload_optimizer"] = {"device": "cpu"}
    return {
        "zero_optimization": section,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
    }


def build(
    stage,
    *,
    precision="fp32",
    accumulation=1,
    offload=False,
    family="llama",
    model_seed=0,
    zero=None,
    relora=None,
    weight_decay=DECAY,
    lr=LR,
    optimizer=None,
    matrix_optimizer=None,
    matrix_lr=None,
    clip=CLIP,
    switching=None,
    **model_changes,
):
    """An engine on the shared small problem."""
    relora = relora or family_config(family)
    model = relora_ds.wrap(FAMILIES[family](model_seed, **model_changes), relora, seed=0)
    engine, *_ = relora_ds.initialize(
        model=model,
        config=ds_settings(stage, precision, offload, **(zero or {})),
        relora=relora,
        lr=lr,
        total_steps=STEPS,
        warmup_steps=WARMUP,
        min_lr_ratio=MIN_RATIO,
        weight_decay=weight_decay,
        optimizer=optimizer,
        precision=precision,
        micro_batch_size=GLOBAL_BATCH // (dist.get_world_size() * accumulation),
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clip,
        matrix_optimizer=matrix_optimizer,
        matrix_lr=matrix_lr,
        switching=switching,
    )
    return engine


def train_step(engine, step: int) -> float:
    """One optimizer step on this rank's part of the global batch; returns the global loss."""
    tokens = batch(step, GLOBAL_BATCH).to(engine.device)
    accumulation = engine.gradient_accumulation_steps()
    mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    total = 0.0
    for micro in mine.chunk(accumulation):
        loss = engine(input_ids=micro, labels=micro).loss
        engine.backward(loss)
        engine.step()
        total += loss.item() / accumulation
    mean = torch.tensor(total, dtype=torch.float64, device=engine.device)
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def smallest_B(engine) -> float:
    """The smallest norm of any lora_B, from the masters."""
    names = [n for n in engine.shards.names if n.endswith("lora_B")]
    return min(value.norm().item() for value in engine.shards.gather(names).values())


def release(engine) -> None:
    release_engine(engine)


def train_case(steps=STEPS, **how) -> dict:
    """Train; returns the losses, the restart steps and the smallest ‖B‖ seen directly before a restart."""
    engine = build(**how)
    seen = {"norms": []}

    def after_step(engine):
        if engine.lr_scheduler.restart_due:
            seen["norms"].append(smallest_B(engine))
        engine.restart_if_due()

    engine.after_step = after_step
    losses = [train_step(engine, step) for step in range(steps)]
    result = {"losses": losses, "restarts": list(engine.restarts), "norms": seen["norms"]}
    release(engine)
    return result


def make_reference(
    optimizer_reset: str,
    family: str = "llama",
    reset_ratio: float = 0.9,
    one_sided: bool = False,
    weight_decay: float = DECAY,
    **model_changes,
) -> Reference:
    model = FAMILIES[family](0, **model_changes)
    drawn = _random_A if one_sided else _drawn_A
    return Reference(
        model,
        4,
        SCALING,
        lambda name, n: drawn(model.get_submodule(name).lora_A, n, name),
        LR,
        weight_decay,
        CLIP,
        jagged_cosine(STEPS, WARMUP, EVERY, REWARM, MIN_RATIO),
        optimizer_reset,
        reset_ratio,
        one_sided=one_sided,
    )


def one_sided_config(family: str = "llama", **changes) -> ReLoRAConfig:
    return family_config(family, **{"trains": "B", "restart_init": "random", "optimizer_reset": "rotate", **changes})


def _random_A(lora_A: torch.Tensor, restart: int, name: str) -> torch.Tensor:
    return random_basis(lora_A.shape, f"0/{restart}/{name}")


def _drawn_A(lora_A: torch.Tensor, restart: int, name: str) -> torch.Tensor:
    *experts, r, inputs = lora_A.shape  # the factors of experts are drawn as one matrix
    rows = torch.Size(experts).numel() * r
    return initial_A(rows, inputs, seed=0, restart=restart, name=name).view(lora_A.shape)


def reference_losses(optimizer_reset: str, family: str = "llama", **model_changes) -> list[float]:
    reference = make_reference(optimizer_reset, family, **model_changes)
    losses = []
    for step in range(STEPS):
        losses.append(reference.step(batch(step, GLOBAL_BATCH)))
        if reference.t % EVERY == 0 and reference.t < STEPS:
            reference.restart()
    return losses


def gathered_state(engine) -> dict[str, dict[str, torch.Tensor]]:
    """Full masters and moments of everything that trains, on every rank."""
    names = engine.shards.names
    return {
        what: {n: v.to("cpu", copy=True) for n, v in engine.shards.gather(names, what).items()}
        for what in ("master", "exp_avg", "exp_avg_sq")
    }


def stored_weights(engine) -> dict[str, torch.Tensor]:
    """The frozen weights as forward reads them, whole, in their stored dtype."""
    from deepspeed.runtime.zero import GatheredParameters

    found = {}
    for name, layer in owned_layers(engine.module).items():
        with GatheredParameters([layer.weight], enabled=hasattr(layer.weight, "ds_tensor")):
            found[name] = layer.weight.detach().to("cpu", copy=True)
    return found


def forward_copies(engine) -> dict[str, torch.Tensor]:
    """What trains, as forward reads it, whole."""
    from deepspeed.runtime.zero import GatheredParameters

    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def logits(engine, step: int = 999) -> torch.Tensor:
    """Logits of a fixed batch, in eval mode."""
    engine.eval()
    with torch.no_grad():
        value = engine(input_ids=batch(step, 4).to(engine.device)).logits.to("cpu", torch.float32, copy=True)
    engine.train()
    return value
