"""What a recipe says of `crnet`, the network that it makes of a LLaMA, and what it refuses."""

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from relora_ds.architectures.relora_crnet import CRNetLinear
from relora_ds.config import RecipeError, load_recipe, method_of, no_effect
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.models.build import meta_model
from relora_ds.planning.cost import cost
from relora_ds.planning.link import flops_per_token
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.training.figures import model_flops_per_token
from relora_ds.training.preflight import resolve
from tests.small_models import FAMILIES, batch, crnet

TINY = ["warm_start_steps=0", "crnet.r=8"]


def prepared(*overrides: str, recipe: str = "tiny"):
    loaded = load_recipe(recipe, overrides or ["method=crnet", *TINY], check_files=False)
    return method_of(loaded).prepare(meta_model(network_of(loaded)[0]))


@pytest.mark.parametrize("size, r", [("60m", 96), ("130m", 224), ("350m", 224), ("1b", 448)])
def test_the_shipped_recipes_have_colas_settings_and_no_more_parameters(size, r):
    own, cola = (load_recipe(f"llama_{size}_{name}", check_files=False) for name in ("crnet", "cola"))
    differs = {key for key, value in vars(own).items() if value != vars(cola)[key]}
    assert differs - {"crnet", "cola"} == {"method", "run_dir"} and own.crnet.r == r and own.crnet.beta == 1
    name = f"llama_{size}_crnet"
    found, larger = (
        count_parameters(prepared(*overrides, recipe=name))[0] for overrides in (["seed=0"], [f"crnet.r={r + 32}"])
    )
    assert found <= count_parameters(prepared("seed=0", recipe=f"llama_{size}_cola"))[0] < larger
    if size == "1b":
        assert round(found / 1e6) == 583, "as reported"


def test_the_network_keeps_what_the_recipe_said_of_it():
    recipe = load_recipe("tiny", ["method=crnet", *TINY, "crnet.beta=0.25"])
    given = LlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}, "tie_word_embeddings": True},
        **{"vocab_size": 99, "attention_bias": True, "num_hidden_layers": 2, "use_cache": False},
    )
    model = meta_model(given)
    model.set_attn_implementation("eager")
    found = method_of(recipe).prepare(model).config
    own = {"model_type", "crnet_r", "crnet_beta", "architectures", "auto_map", "transformers_version", "dtype"}
    before, after = given.to_dict(), found.to_dict()
    assert {key: after[key] for key in after.keys() - own} == {key: before[key] for key in before.keys() - own}
    assert (found.model_type, found.crnet_r, found.crnet_beta) == ("relora_crnet", 8, 0.25)
    assert found._attn_implementation == "eager"


def test_no_beta_has_weight_decay():
    """It would draw a layer away from the one before."""
    method = method_of(load_recipe("tiny", ["method=crnet", *TINY, "optim.weight_decay=0.1"]))
    model = method.prepare(meta_model(network_of(method.recipe)[0]))
    betas = {id(module.beta) for module in model.modules() if isinstance(module, CRNetLinear)}
    decayed = [p for group in method.param_groups(model) if group["weight_decay"] for p in group["params"]]
    assert len(betas) == 7 and decayed and not betas & set(map(id, decayed))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method=relora", "crnet.r=8"], "crnet.r: 8 has no effect with method relora"),
        (["method=full", "warm_start_steps=0", "crnet.beta=0.5"], "crnet.beta: 0.5 has no effect with method full"),
        (["method=crnet", *TINY], "relora.r: 4 has no effect with method crnet, whose rank is crnet.r: 8"),
        (["method=crnet", *TINY, "cola.r=4"], "cola.r: 4 has no effect with method crnet"),
    ],
)
def test_keys_without_effect_are_named(overrides, words):
    warnings = no_effect.warnings(load_recipe("tiny", overrides))
    assert any(words in warning for warning in warnings), warnings


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["crnet.r=0"], "crnet.r: 0 is not an integer of at least 1; use e.g. 96"),
        (["crnet.rank=8"], "crnet.rank: unknown key"),
        (["crnet.beta=0"], "crnet.beta: 0.0 is not a number above 0; use e.g. 1.0"),
        (["crnet.beta=-1"], "crnet.beta: -1.0 is not a number above 0"),
        (
            ["init_from=runs/other"],
            "init_from: runs/other does not fit method crnet, which trains factors from scratch",
        ),
        (["model.preset=null", "model.name_or_path=org/llama", "model.init=pretrained"], "model.init: pretrained does"),
        (["model.use_liger_kernel=true"], "model.use_liger_kernel: true does not fit method crnet"),
        (["method=relora", "warm_start_steps=10", "warm_start_method=crnet"], "warm_start_method: crnet trains a net"),
    ],
)
def test_values_that_are_refused_without_a_model(overrides, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", ["method=crnet", *TINY, *overrides], check_files=False)
    assert any(problem.startswith(words) for problem in caught.value.problems), caught.value.problems


def problems(tmp_path, config, *overrides: str) -> list[str]:
    config.save_pretrained(tmp_path / "shape")
    model = ["model.preset=null", f"model.name_or_path={tmp_path / 'shape'}"]
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", ["method=crnet", *TINY, f"run_dir={tmp_path / 'run'}", *model, *overrides])
    assert not (tmp_path / "run").exists()
    return caught.value.problems


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_family_without_its_layers_is_refused_by_name(tmp_path, family):
    """Fused linears, experts."""
    longest = {"gpt2": "n_positions"}.get(family, "max_position_embeddings")
    config = FAMILIES[family](**{longest: 64}).config
    (problem,) = problems(tmp_path, config)
    assert problem.startswith("method: crnet builds LLaMA's layers") and f"a {config.model_type} model" in problem


def test_a_rank_above_the_smaller_side_is_refused(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1)
    config = LlamaConfig(**shape, num_hidden_layers=2, vocab_size=512)
    (problem,) = problems(tmp_path, config, "crnet.r=9")
    assert problem == "crnet.r: 9 exceeds the smaller side of layers.0.self_attn.k_proj (8x32); use crnet.r <= 8"


def test_a_single_layer_is_refused(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=512
    )
    (problem,) = problems(tmp_path, config)
    assert problem.startswith("method: crnet leaves the first layer whole, and this model has no other")


def test_a_model_without_layers_is_refused(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=512)
    (problem,) = problems(tmp_path, LlamaConfig(**shape, num_hidden_layers=0))
    assert problem.startswith("method: crnet puts factors into layers, and this model has none (num_hidden_layers: 0)")


def test_its_own_network_is_trained_by_method_full(tmp_path):
    (problem,) = problems(tmp_path, crnet(max_position_embeddings=64).config)
    assert problem.startswith("method: crnet builds LLaMA's layers") and "a relora_crnet model" in problem
    model = ["model.preset=null", f"model.name_or_path={tmp_path / 'shape'}"]
    assert resolve("tiny", ["method=full", "warm_start_steps=0", *model]).recipe.method == "full"


def test_flops_are_those_of_the_products():
    model, tokens, length = crnet(), batch(0, 2), 12
    model.set_attn_implementation("sdpa")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    attention = 6 * model.config.num_hidden_layers * model.config.hidden_size * length
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    expected = model_flops_per_token(model, length) - attention - 6 * vectors
    counted = counter.get_total_flops() / tokens.numel()
    by_operator = counter.flop_counts["Global"]
    counted -= sum(flops for op, flops in by_operator.items() if "attention" in str(op)) / tokens.numel()
    assert counted == expected


def test_the_plan_counts_the_network_that_is_trained():
    resolved = resolve("tiny", ["method=crnet", *TINY], 2, to_run=False)
    method, (config, _) = method_of(resolved.recipe), network_of(resolved.recipe)
    shapes, trained = shapes_of(method, config), count_parameters(prepared())[0]
    dense, factors = 4 * 64 * 64 + 3 * 64 * 176, 8 * (4 * (64 + 64) + 3 * (64 + 176))
    assert trained == 2 * 512 * 64 + dense + factors + 7 + 5 * 64
    assert (shapes.num_trainable, shapes.num_frozen, shapes.merged) == (trained, 0, {})
    assert cost(resolved, method, config).step == (8 * trained, 6 * trained), "fp32, ZeRO-1, two ranks"
    assert flops_per_token(shapes, config, 64) == model_flops_per_token(prepared(), 64)
