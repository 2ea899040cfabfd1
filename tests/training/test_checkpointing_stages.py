"""Activation checkpointing under ZeRO, on 2 ranks: the run is the same, and ZeRO-3 gathers again what is repeated."""

import json

import pytest
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

import relora_ds
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.models import recompute
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from relora_ds.zero.traffic import count_traffic
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import FAMILIES
from tests.training.runs import lines, losses

MODES = ["full", "selective", "cheap", "low_rank"]
RESTART = 3
STEPS = 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
# Nothing is kept for its next use, nothing is fetched before it is needed ...
TIGHT = {
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 1,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
# ... or fetched in portions that end between layers.
PREFETCH = {
    "stage3_max_live_parameters": 4000,
    "stage3_max_reuse_distance": 1000,
    "stage3_prefetch_bucket_size": 3000,
    "stage3_param_persistence_threshold": 0,
}


def train(
    mode: str,
    stage: int,
    *,
    method: str = "relora",
    accumulation: int = 1,
    family: str = "llama",
    sizes: dict = SIZES,
    zero: dict | None = None,
    dropout: float = 0.0,
    frozen_dtype: str = "auto",
    placement: str = "auto",
) -> dict:
    """Four steps with a restart after the third."""
    relora = (
        cases.relora_config(
            restart_every=RESTART,
            restart_warmup_steps=1,
            lora_dropout=dropout,
            frozen_dtype=frozen_dtype,
            frozen_placement=placement,
        )
        if method == "relora"
        else None
    )
    model = FAMILIES[family](**sizes)
    model.set_attn_implementation("sdpa")
    if relora is not None:
        relora_ds.wrap(model, relora)
    recompute.apply(model, mode)
    engine, *_ = relora_ds.initialize(
        model,
        cases.ds_settings(stage, "fp32", **(zero or {})),
        relora,
        lr=1e-2,
        total_steps=cases.STEPS,
        micro_batch_size=cases.GLOBAL_BATCH // (2 * accumulation),
        gradient_accumulation_steps=accumulation,
    )
    found = {"losses": [], "gathered": set(), "stack": []}
    for step in range(STEPS):
        with count_traffic() as traffic:
            found["losses"].append(cases.train_step(engine, step))
        found["gathered"].update(gathered(engine))
        found["stack"].append(len(FWD_MODULE_STACK))
    found["restarts"], found["payload"] = list(engine.restarts), traffic.payload
    last = ("down_proj", "dense_4h_to_h")
    found["repeated"] = sum(
        layer.weight.ds_tensor.element_size() * layer.weight.ds_numel
        for name, layer in lowrank_layers(engine.module).items()
        if hasattr(layer.weight, "ds_tensor") and not name.endswith(last)
    )
    cases.release(engine)
    return found


def gathered(engine) -> list[str]:
    """Weights that ZeRO-3 has not let go of, beside those that it means to keep, or believes to be in use."""
    return [
        name
        for name, p in engine.module.named_parameters()
        if hasattr(p, "ds_status")
        and ((p.ds_status == ZeroParamStatus.AVAILABLE and not p.ds_persist) or p.ds_active_sub_modules)
    ]


def compare(stage: int, modes: list[str], **how) -> tuple[dict, dict]:
    """Without and with checkpointing: the same losses to the bit. Returns both findings, of the last mode."""
    plain = ranks(2).run(train, "none", stage, **how)[0]
    assert plain["restarts"] == ([RESTART] if how.get("method", "relora") == "relora" else [])
    for mode in modes:
        found = ranks(2).run(train, mode, stage, **how)[0]
        assert found["losses"] == plain["losses"], mode
        assert found["restarts"] == plain["restarts"]
        assert not found["gathered"]
        assert found["stack"] == [found["stack"][0]] * STEPS, "what ZeRO-3 keeps of the repetitions grows"
    return plain, found


@pytest.mark.parametrize(
    "method, stage",
    [
        ("relora", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (*(("relora", stage) for stage in (0, 1, 2)), *(("full", stage) for stage in (0, 1, 2, 3)))
        ),
    ],
)
def test_the_run_is_the_same(method, stage):
    compare(stage, MODES, method=method, accumulation=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage, placement", [(1, "auto"), (3, "sharded"), (3, "replicated")])
@pytest.mark.parametrize("frozen_dtype", ["int8", "nf4"])
def test_with_quantized_weights(frozen_dtype, stage, placement):
    compare(stage, ["full", "cheap"], frozen_dtype=frozen_dtype, placement=placement, accumulation=2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_with_dropout(stage):
    """The repetition draws the same mask; every rank, step and micro-step has its own."""
    compare(stage, MODES, dropout=0.3, accumulation=2)


@pytest.mark.parametrize(
    "family, zero, modes",
    [
        pytest.param("llama", PREFETCH, ["cheap"], id="llama-prefetch-cheap"),
        *(
            pytest.param(family, zero, MODES, id=f"{family}-{name}", marks=pytest.mark.slow)
            for family in FAMILIES
            for name, zero in (("tight", TIGHT), ("prefetch", PREFETCH))
        ),
    ],
)
def test_however_zero_3_fetches(family, zero, modes):
    compare(3, modes, family=family, zero=zero, sizes={})


@pytest.mark.parametrize(
    "frozen_dtype, placement",
    [
        ("int8", "sharded"),
        pytest.param("auto", "sharded", marks=pytest.mark.slow),
        pytest.param("int8", "replicated", marks=pytest.mark.slow),
    ],
)
def test_what_zero_3_gathers_again(frozen_dtype, placement):
    """Every sharded frozen weight of the layers once more a micro-step, but each layer's last: it is still there."""
    plain, found = compare(3, ["cheap"], frozen_dtype=frozen_dtype, placement=placement, accumulation=2)
    assert found["payload"] == plain["payload"] + 2 * plain["repeated"]
    assert (plain["repeated"] > 0) == (placement == "sharded")


RECIPE = [
    "train.steps=12",
    "warm_start_steps=4",
    "relora.restart_every=4",
    "relora.restart_warmup_steps=1",
    "optim.warmup_steps=1",
    "log.every=1",
    "eval.every=6",
    "checkpoint.every=null",
]


def train_recipe(overrides: list[str]) -> tuple[float, float]:
    """How often each layer was checkpointed a micro-step, and the last validation loss."""
    calls, contexts = [], recompute._contexts
    plan = check("tiny", overrides)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(recompute, "_contexts", lambda *how: calls.append(how) or contexts(*how))
        summary = Trainer(plan).fit()
    num_micro_steps = plan.recipe.total_steps * plan.accumulation
    return len(calls) / (num_micro_steps * plan.model_config.num_hidden_layers), summary["val_loss"]


@pytest.mark.slow
def test_a_recipe_with_a_warm_start(tmp_path):
    """Warm start, phase transition, restart, evaluation, samples and export."""

    def train(name: str, *overrides: str):
        return ranks(2).run(train_recipe, [f"run_dir={tmp_path / name}", *RECIPE, *overrides])[0]

    times, val_loss = train("none")
    assert times == 0
    times, same = train("cheap", "activation_checkpointing=cheap", "deepspeed=zero3")
    assert times == 1 and same == pytest.approx(val_loss, rel=1e-5)
    assert len(lines(tmp_path / "cheap", "restart")) == 1
    assert losses(tmp_path / "cheap") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)
    assert json.loads((tmp_path / "cheap" / "export" / "config.json").read_text())["model_type"] == "llama"
