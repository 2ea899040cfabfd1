"""A run that is one of several islands: what must be equal on all of them."""

from relora_ds.exchange.island import Islands
from relora_ds.training import compatibility
from relora_ds.training.preflight import Plan

# What islands may have each for itself: sections, and keys.
_OWN = ("run_dir", "resume", "overwrite", "deepspeed", "compile")
_OWN_SECTIONS = ("log", "checkpoint", "eval", "guard", "islands")
_OWN_SIZES = ("train.batch_sequences", "train.batch_tokens", "train.micro_batch_size", "activation_checkpointing")
_LOCAL = ("data.cache_dir", "data.path", "init_from", "model.use_liger_kernel", "model.attn_implementation")


def islands_of(plan: Plan) -> Islands | None:
    """Return the membership of a run that is an island, None of another."""
    settings = plan.recipe.islands
    if settings.count is None:
        return None
    about = compatibility.of(plan)
    recipe = {
        name: _without_paths(value) if name == "data.mix" else value
        for name, value in about["recipe"].items()
        if name not in (*_OWN, *_OWN_SIZES, *_LOCAL) and name.partition(".")[0] not in _OWN_SECTIONS
    }
    return Islands(
        settings,
        {**recipe, "data": about["data"], "total_steps": about["total_steps"]},
        kept_checkpoints=plan.recipe.checkpoint.keep_last + 1,  # one is being written when the oldest is deleted
    )


def _without_paths(mix: list[dict] | None) -> list[dict] | None:
    """Return the items of `data.mix` without their paths, which may differ, and names that follow them."""
    local = ("path", "name")
    return mix and [{key: value for key, value in item.items() if key not in local} for item in mix]
