"""What a recipe says of `cola` and `cola_m`, the networks that they make of others, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from relora_ds.config import ModelConfig, RecipeError, load_recipe, method_of, no_effect
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.models.build import build_config, meta_model
from relora_ds.planning.cost import cost
from relora_ds.planning.link import flops_per_token
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.training.figures import model_flops_per_token
from relora_ds.training.preflight import resolve
from tests.small_models import FAMILIES, batch, cola

VECTORS = json.loads((Path(__file__).parents[1] / "fixtures/cola/vectors.json").read_text(encoding="utf-8"))
TINY = ["warm_start_steps=0", "cola.r=8"]
SIZES = {"60m": (128, 6e-3, 2000, 10_000), "130m": (256, 3e-3, 2000, 20_000)}
SIZES |= {"350m": (256, 3e-3, 6000, 60_000), "1b": (512, 2e-3, 10_000, 100_000)}


def prepared(*overrides: str, method: str = "cola"):
    recipe = load_recipe("tiny", [f"method={method}", *TINY, *overrides])
    return method_of(recipe).prepare(meta_model(network_of(recipe)[0]))


@pytest.mark.parametrize("size", VECTORS["sizes"])
def test_the_papers_sizes(size):
    about = VECTORS["sizes"][size]
    config = build_config(ModelConfig(preset=f"llama_{size}"), vocab_size=32_000, seq_len=256)
    recipe = load_recipe("tiny", ["method=cola", *TINY, f"cola.r={about['r']}"])
    assert count_parameters(method_of(recipe).prepare(meta_model(config))) == (about["params"], about["params"])


@pytest.mark.parametrize("size", SIZES)
def test_the_shipped_recipes_have_the_published_settings(size):
    r, lr, warmup, steps = SIZES[size]
    plain, recomputed = (load_recipe(f"llama_{size}_{name}", check_files=False) for name in ("cola", "cola_m"))
    assert (plain.cola.r, plain.optim.lr, plain.optim.warmup_steps, plain.total_steps) == (r, lr, warmup, steps)
    assert (plain.optim.weight_decay, plain.optim.max_grad_norm, plain.optim.schedule) == (0.01, 0.5, "cosine")
    assert (plain.batch_sequences, plain.data.seq_len, plain.data.packing) == (512, 256, False)
    assert plain.cola.only_lr_activation == (size in ("350m", "1b"))
    assert VECTORS["sizes"][size]["r"] == r and VECTORS["sizes"][size]["r_inner_lr"] == lr
    differs = {key for key, value in vars(plain).items() if value != vars(recomputed)[key]}
    assert differs == {"method", "activation_checkpointing", "run_dir"}
    assert (plain.activation_checkpointing, recomputed.activation_checkpointing) == ("none", "low_rank")


def test_the_network_keeps_what_the_recipe_said_of_it():
    recipe = load_recipe("tiny", ["method=cola", *TINY])
    given = LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "tie_word_embeddings": True},
        **{"vocab_size": 99, "attention_bias": True, "num_hidden_layers": 2, "use_cache": False},
    )
    model = meta_model(given)
    model.set_attn_implementation("eager")
    found = method_of(recipe).prepare(model).config
    own = {"model_type", "cola_r", "architectures", "auto_map", "transformers_version", "dtype"}
    before, after = given.to_dict(), found.to_dict()
    assert {key: after[key] for key in after.keys() - own} == {key: before[key] for key in before.keys() - own}
    assert (found.model_type, found.cola_r, found._attn_implementation) == ("relora_cola", 8, "eager")


@pytest.mark.parametrize("dropped, activation", [("false", F.silu), ("true", lambda gate: gate)])
def test_the_feed_forwards_own_activation_stays_unless_the_recipe_drops_it(dropped, activation):
    mlp = prepared(f"cola.only_lr_activation={dropped}").model.layers[0].mlp.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_(std=0.1)
    x = torch.randn(3, 64)
    torch.testing.assert_close(mlp(x), mlp.down_proj(activation(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_cola_m_is_a_name_for_cola_with_another_recomputation():
    recipe = load_recipe("tiny", ["method=cola_m", *TINY, "relora.r=8"])
    assert recipe.activation_checkpointing == "low_rank" and not no_effect.warnings(recipe)
    assert {name: p.shape for name, p in prepared(method="cola_m").named_parameters()} == {
        name: p.shape for name, p in prepared().named_parameters()
    }
    with pytest.raises(RecipeError, match="activation_checkpointing: cheap is not CoLA-M"):
        load_recipe("tiny", ["method=cola_m", *TINY, "activation_checkpointing=cheap"])


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method=relora", "cola.r=8"], "cola.r: 8 has no effect with method relora"),
        (["method=full", "warm_start_steps=0", "cola.only_lr_activation=true"], "cola.only_lr_activation: True has no"),
        (
            ["method=cola", "cola.r=8"],
            "warm_start_steps: 10 has no effect with method cola, which has no low-rank phase",
        ),
        (["method=cola", *TINY], "relora.r: 4 has no effect with method cola, whose rank is cola.r: 8"),
        (["method=cola", *TINY, "lora.base=random"], "lora.base: random has no effect with method cola"),
    ],
)
def test_keys_without_effect_are_named(overrides, words):
    assert any(words in warning for warning in no_effect.warnings(load_recipe("tiny", overrides)))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["cola.r=0"], "cola.r: 0 is not an integer of at least 1; use e.g. 128"),
        (["cola.rank=8"], "cola.rank: unknown key"),
        (["cola.only_lr_activation=3"], "cola.only_lr_activation: 3 "),
        (["init_from=runs/other"], "init_from: runs/other does not fit method cola, which trains factors from scratch"),
        (["model.preset=null", "model.name_or_path=org/llama", "model.init=pretrained"], "model.init: pretrained does"),
        (["model.use_liger_kernel=true"], "model.use_liger_kernel: true does not fit method cola"),
        (
            ["method=relora", "warm_start_steps=10", "warm_start_method=cola"],
            "warm_start_method: cola trains a network",
        ),
    ],
)
def test_values_that_are_refused_without_a_model(overrides, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", ["method=cola", *TINY, *overrides], check_files=False)
    assert any(problem.startswith(words) for problem in caught.value.problems), caught.value.problems


def problems(tmp_path, config, *overrides: str) -> list[str]:
    config.save_pretrained(tmp_path / "shape")
    model = ["model.preset=null", f"model.name_or_path={tmp_path / 'shape'}"]
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", ["method=cola", *TINY, f"run_dir={tmp_path / 'run'}", *model, *overrides])
    return caught.value.problems


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_a_family_without_its_layers_is_refused_by_name(tmp_path, family):
    """Fused linears, experts, layers that are not LLaMA's."""
    longest = {"gpt2": "n_positions"}.get(family, "max_position_embeddings")
    config = FAMILIES[family](**{longest: 64}).config
    (problem,) = problems(tmp_path, config)
    assert problem.startswith("method: cola builds LLaMA's layers") and f"a {config.model_type} model" in problem


def test_a_model_without_layers_is_refused(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=512)
    (problem,) = problems(tmp_path, LlamaConfig(**shape, num_hidden_layers=0))
    assert problem.startswith("method: cola puts factors into layers, and this model has none (num_hidden_layers: 0)")


def test_its_own_network_is_trained_by_method_full(tmp_path):
    (problem,) = problems(tmp_path, cola(max_position_embeddings=64).config)
    assert "this is a relora_cola model" in problem
    model = ["model.preset=null", f"model.name_or_path={tmp_path / 'shape'}", f"run_dir={tmp_path / 'run'}"]
    assert resolve("tiny", ["method=full", "warm_start_steps=0", *model]).recipe.method == "full"


def test_a_rank_above_the_smaller_side_is_refused(tmp_path):
    """Keys and values of grouped heads are narrower than all else."""
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1)
    config = LlamaConfig(**shape, num_hidden_layers=2, vocab_size=512)
    (problem,) = problems(tmp_path, config, "cola.r=9")
    assert problem == "cola.r: 9 exceeds the smaller side of layers.0.self_attn.k_proj (8x32); use cola.r <= 8"


def test_another_class_of_a_llamas_configuration_is_refused():
    class Other(LlamaForCausalLM):
        pass

    method = method_of(load_recipe("tiny", ["method=cola", *TINY]))
    with torch.device("meta"):
        (problem,) = method.problems(Other(FAMILIES["llama"]().config))
    assert problem.startswith("method: cola builds LLaMA's layers")


def test_flops_are_those_of_the_factors():
    model, tokens, length = cola(), batch(0, 2), 12
    model.set_attn_implementation("sdpa")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    attention = 6 * model.config.num_hidden_layers * model.config.hidden_size * length
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    expected = model_flops_per_token(model, length) - attention - 6 * vectors
    counted = counter.get_total_flops() / tokens.numel()
    pair = counter.flop_counts["Global"]
    counted -= sum(flops for op, flops in pair.items() if "attention" in str(op)) / tokens.numel()
    assert counted == expected


def test_the_plan_counts_the_network_that_is_trained():
    resolved = resolve("tiny", ["method=cola", *TINY], 2, to_run=False)
    method, (config, _) = method_of(resolved.recipe), network_of(resolved.recipe)
    shapes, trained = shapes_of(method, config), count_parameters(prepared())[0]
    assert (shapes.num_trainable, shapes.num_frozen, shapes.merged) == (trained, 0, {})
    assert cost(resolved, method, config).step == (8 * trained, 6 * trained), "fp32, ZeRO-1, two ranks"
    assert flops_per_token(shapes, config, 64) == model_flops_per_token(prepared(), 64)
