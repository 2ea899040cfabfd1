"""Methods whose owners update whole weights: what a recipe makes of them, and what does not go with them."""

import re

import pytest
from transformers import LlamaConfig, MixtralConfig

from relora_ds.config import RecipeError, load_recipe, method_of, no_effect
from relora_ds.config.methods import warm_start_of
from relora_ds.matrix.adam import ProjectedAdam
from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.muon_update import Muon
from relora_ds.matrix.scale_update import Scale
from relora_ds.matrix.sst_update import SST
from relora_ds.models.build import meta_model
from relora_ds.planning import host
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.planning.planned_storage import storage_of
from relora_ds.training.preflight import resolve

METHODS = ("fira", "apollo", "apollo_mini", "scale", "muon", "sst")
SMALL = ["model.preset=llama_20m", "train.steps=20", "train.batch_sequences=8", "optim.warmup_steps=2"]
HUGGING_FACE = ProjectedAdam(betas=(0.9, 0.95), eps=1e-6)


def recipe(tmp_path, method: str, *overrides: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: {method}\n")
    return load_recipe(str(path), [*SMALL, *overrides])


def rules(recipe) -> dict:
    method, (config, _) = method_of(recipe), network_of(recipe)
    return method.matrix_optimizers(method.prepare(meta_model(config)))


@pytest.mark.parametrize(
    ("method", "overrides", "expected"),
    [
        (
            "fira",
            ["relora.r=8", "fira.variant=paper", "fira.alpha=0.5", "optim.betas=[0.9, 0.95]"],
            Fira(8, HUGGING_FACE, alpha=0.5, variant="paper"),
        ),
        ("apollo", ["relora.r=8", "apollo.update_proj_gap=50"], Apollo(8, ProjectedAdam(), update_proj_gap=50)),
        ("apollo_mini", ["relora.r=8"], Apollo(1, ProjectedAdam(), scale_type="tensor", scale=128.0)),
        ("muon", ["muon.momentum=0.9", "muon.adjust=original"], Muon(momentum=0.9, adjust="original")),
        (
            "sst",
            ["relora.r=8", "sst.iteration_steps=50", "sst.iteration_warmup_steps=5", "optim.betas=[0.9, 0.95]"],
            SST(8, (0.9, 0.95), iteration_steps=50, iteration_warmup_steps=5),
        ),
    ],
)
def test_a_recipe_says_what_the_rule_of_every_linear_is(tmp_path, method, overrides, expected):
    found = rules(recipe(tmp_path, method, *overrides))
    assert len(found) == 7 * 4 and all(rule == expected for rule in found.values())
    assert not any(name in found for name in ("lm_head", "model.embed_tokens"))


def test_scale_has_rules_of_its_own_for_head_and_embedding(tmp_path):
    found = rules(recipe(tmp_path, "scale", "scale.momentum=0.8"))
    assert found["lm_head"] == Scale("head", momentum=0.8)
    assert found["model.embed_tokens"] == Scale("embedding", momentum=0.8)
    assert {rule.kind for name, rule in found.items() if name.startswith("model.layers")} == {"hidden"}


@pytest.mark.parametrize("method", METHODS)
def test_all_of_the_network_trains_from_the_first_step_to_the_last(tmp_path, method):
    found = recipe(tmp_path, method)
    assert not no_effect.warnings(found)
    method = method_of(found)
    assert method.warm_start_steps == 0 and method.num_restarts == 0 and not method.is_low_rank
    config, _ = network_of(found)
    shapes, full = shapes_of(method, config), shapes_of(method_of(recipe(tmp_path, "full")), config)
    assert shapes.num_trainable + shapes.num_owned == full.num_trainable and shapes.num_owned == shapes.num_frozen
    assert shapes.looked_up == full.looked_up


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_start_with_what_the_name_stands_for(tmp_path, method):
    overrides = [f"warm_start_method={method}", "warm_start_steps=8", "relora.restart_every=6", "relora.r=4"]
    found = recipe(tmp_path, "relora", *overrides, "relora.restart_warmup_steps=1")
    warm = warm_start_of(found)
    assert warm.has_owners and found.relora.trains == "both" and not no_effect.warnings(found)
    config, _ = network_of(found)
    rule = next(iter(warm.matrix_optimizers(warm.prepare(meta_model(config))).values()))
    if method == "apollo_mini":
        assert (rule.scale, rule.scale_type, rule.r, rule.adam.eps) == (128.0, "tensor", 1, 1e-6)


def test_an_owner_phase_collects_no_gradients_for_the_restarts_after_it(tmp_path):
    changes = [
        "warm_start_method=muon",
        "warm_start_steps=8",
        "relora.restart_every=6",
        "relora.restart_warmup_steps=1",
    ]
    found = recipe(tmp_path, "relora", *changes, "relora.restart_init=gradient", "relora.gradient_estimate=exact")
    warm, (config, _) = warm_start_of(found), network_of(found)
    storage = storage_of(shapes_of(warm, config), warm.relora, precision="fp32", stage=1)
    items = host.moments(shapes_of(warm, config), storage, warm.relora, world_size=2, after_warm_start=False)
    assert items and not any("exact" in item.what for item in items)


def test_a_warm_start_keeps_what_the_recipe_says(tmp_path):
    changes = ["warm_start_method=apollo_mini", "warm_start_steps=8", "relora.r=4", "apollo.scale=64"]
    found = recipe(tmp_path, "relora", *changes, "relora.restart_every=6", "relora.restart_warmup_steps=1")
    assert not no_effect.warnings(found)
    warm, (config, _) = warm_start_of(found), network_of(found)
    rule = next(iter(warm.matrix_optimizers(warm.prepare(meta_model(config))).values()))
    assert (rule.scale, rule.scale_type) == (64.0, "tensor") and warm.recipe.optim.eps == 1e-6


def test_values_that_clash_are_problems_of_the_recipe(tmp_path):
    changes = ["warm_start_method=scale", "warm_start_steps=8", "relora.restart_every=6"]
    with pytest.raises(RecipeError, match="relora.restart_every: 6 is not above relora.restart_warmup_steps 100"):
        recipe(tmp_path, "relora", *changes)


def test_a_low_rank_warm_start_has_no_effect(tmp_path):
    found = recipe(tmp_path, "apollo", "warm_start_method=galore", "warm_start_steps=8")
    assert any("warm_start_steps: 8 has no effect" in warning for warning in no_effect.warnings(found))


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("muon", "relora.trains=none", "relora.trains: none is what the methods"),
        ("muon", "muon.momentum=1", "muon.momentum: 1.0 is outside"),
        ("fira", "fira.variant=theirs", "fira.variant: 'theirs'"),
        ("fira", "fira.update_proj_gap=0", "fira.update_proj_gap: 0"),
        ("apollo", "apollo.scale_type=row", "apollo.scale_type: 'row'"),
        ("apollo", "optim.matrix_lr=0", "optim.matrix_lr: 0"),
        ("sst", "sst.iteration_steps=0", "sst.iteration_steps: 0"),
        ("sst", "optim.weight_decay=0.1", "optim.weight_decay: 0.1 is not supported with method sst"),
        ("sst", "relora.target_parameters=[w]", "relora.target_parameters: .* is not supported with method sst"),
        ("muon", "islands.count=2", "islands.count: 2 with method muon, whose owners update whole weights"),
        (
            "relora",
            "optim.weight_decay=0.1",
            "warm_start_method: sst: optim.weight_decay: 0.1 is not supported with method sst",
        ),
        (
            "relora",
            "relora.target_parameters=[w]",
            "warm_start_method: sst: relora.target_parameters: .* is not supported with method sst",
        ),
    ],
)
def test_what_it_cannot_be(tmp_path, method, override, message):
    warm_start = ["warm_start_method=sst", "warm_start_steps=8", "relora.restart_every=6"] * (method == "relora")
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, method, override, *warm_start, *["relora.restart_warmup_steps=1"] * bool(warm_start))


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("full", "optim.matrix_lr=0.01", "optim.matrix_lr: 0.01 has no effect with method full"),
        ("relora", "muon.momentum=0.9", "muon.momentum: 0.9 has no effect with method relora"),
        ("muon", "apollo.scale=2", "apollo.scale: 2.0 has no effect with method muon"),
        ("muon", "relora.r=8", "relora.r: 8 has no effect with method muon"),
        ("fira", "relora.lora_alpha=8", "relora.lora_alpha: 8.0 has no effect with method fira"),
        ("sst", "sst.iteration_steps=10", "sst.iteration_warmup_steps: 20 is more than sst.iteration_steps 10"),
        ("muon", "warm_start_steps=5", "warm_start_steps: 5 has no effect with method muon"),
        ("sst", "warm_start_steps=5", "warm_start_steps: 5 has no effect with method sst"),
    ],
)
def test_what_has_no_effect(tmp_path, method, override, message):
    assert any(message in found for found in no_effect.warnings(recipe(tmp_path, method, override)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["relora.frozen_dtype=int8"], "relora.frozen_dtype: int8 is for linears, and model.embed_tokens"),
        (["method=relora", "warm_start_steps=0"], "relora.target_modules: all-matrices has the head"),
    ],
)
def test_what_an_embedding_does_not_go_with(changes, message):
    with pytest.raises(RecipeError, match=message):
        resolve("tiny", ["method=scale", "relora.target_modules=all-matrices", *changes], 1, to_run=False)


def test_what_would_stay_frozen_is_refused_by_name():
    changes = ["method=muon", "relora.exclude_modules=[q_proj]"]
    remedy = "relora.trainable_modules=[embeddings, head, norms, q_proj]"
    with pytest.raises(RecipeError, match=r"q_proj.weight \(and 1 like it\) would be frozen for good") as found:
        resolve("tiny", changes, 1, to_run=False)
    assert remedy in str(found.value)
    resolve("tiny", [*changes, remedy], 1, to_run=False)


@pytest.mark.parametrize("method", ["fira", "apollo", "sst"])
def test_a_rank_above_the_sides_of_all_weights_is_refused(method):
    changes = [f"method={method}", "warm_start_steps=0", "relora.r=65"]
    said = r"relora.r: 65 exceeds the smaller side of every weight, also of .*q_proj \(64x64\); use relora.r <= 64"
    with pytest.raises(RecipeError, match=said):
        resolve("tiny", changes, 1, to_run=False)


def test_weights_that_are_narrower_than_the_rank_have_what_they_can(tmp_path):
    """Keys and values of grouped heads, with the rank of the rest; their states are no larger than Adam's."""
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1)
    model = meta_model(LlamaConfig(**shape, num_hidden_layers=1, vocab_size=512))
    for name in ("fira", "apollo", "sst"):
        method = method_of(recipe(tmp_path, name, "relora.r=32"))
        assert method.problems(model) == []
        state = method.rule().begin((16, 64), device="meta")
        moments = [name for name in state if name.endswith("m") and name != "norm"]
        assert moments and all(state[name].numel() <= 16 * 64 for name in moments)


def test_experts_that_would_stay_frozen_are_refused_with_what_trains_them(tmp_path):
    MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_local_experts=2).save_pretrained(
        tmp_path
    )
    changes = ["method=muon", "model.preset=null", f"model.name_or_path={tmp_path}"]
    with pytest.raises(RecipeError, match="experts.gate_up_proj, .* would be frozen for good") as found:
        resolve("tiny", changes, 1, to_run=False)
    remedies = re.findall(r"relora\.\w+=\[[^]]*\]", str(found.value))
    assert [one.partition("=")[0] for one in remedies] == ["relora.trainable_modules", "relora.target_parameters"]
    resolve("tiny", [*changes, *remedies], 1, to_run=False)
    with pytest.raises(RecipeError, match="method sst trains every weight; use .*gate, experts]$"):
        resolve("tiny", [*changes, "method=sst"], 1, to_run=False)
    whole = "relora.trainable_modules=[embeddings, head, norms, gate, experts]"
    resolve("tiny", [*changes, "method=sst", whole], 1, to_run=False)


def test_tied_embeddings_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 20, "n_layer": 2, "n_head": 2}')
    model = ["model.preset=null", f"model.name_or_path={tmp_path / 'config.json'}"]
    with pytest.raises(RecipeError, match="the weight of .*lm_head.* is shared .* relora.exclude_modules=") as found:
        resolve("tiny", ["method=scale", *model], 1, to_run=False)
    assert "merged" not in str(found.value)
    resolve("tiny", ["method=scale", *model, "relora.exclude_modules=[wte, lm_head]"], 1, to_run=False)
