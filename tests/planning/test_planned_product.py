"""What `check` says about folding."""

import pytest

from relora_ds.config import load_recipe
from relora_ds.lowrank.folding import folds_from
from relora_ds.lowrank.formats import DENSE, format_named
from relora_ds.methods import method_of
from relora_ds.planning.network import network_of
from relora_ds.planning.planned_product import product_line


def line_of(*overrides: str, format=DENSE, precision="fp32") -> str | None:
    recipe = load_recipe("tiny", list(overrides))
    return product_line(recipe, method_of(recipe), network_of(recipe)[0], format, precision)


def numbers() -> tuple[list[int], int]:
    """The tokens from which on each kind of layer of `tiny` folds, and those of a row."""
    recipe = load_recipe("tiny", [])
    config, _ = network_of(recipe)
    hidden, ffn = config.hidden_size, config.intermediate_size
    shapes = [(hidden, hidden), (ffn, hidden), (hidden, ffn)]
    return [folds_from(*shape, trains_A=True) for shape in shapes], recipe.data.seq_len


@pytest.mark.parametrize("product", ["auto", "folded", "separate"])
def test_the_rule_is_said_with_its_numbers(product):
    firsts, seq_len = numbers()
    rows = -(-max(firsts) // seq_len)
    for size, done in ((1, "separate"), (rows, "folded")):
        line = line_of(f"train.micro_batch_size={size}", f"train.batch_sequences={size}", f"relora.product={product}")
        begins = f"product: {done} (" if product == "auto" else f"product: {product} by relora.product={product} ("
        assert line.startswith(begins)
        assert f"auto folds from {min(firsts):,} to {max(firsts):,} tokens per micro-batch on, by shape; " in line
        assert line.endswith(f"this run has {size * seq_len:,})")


@pytest.mark.parametrize(
    "overrides, how, words",
    [
        (["relora.lora_dropout=0.1"], {}, "lora_dropout"),
        ([], {"format": format_named("fp8_both_layouts"), "precision": "bf16"}, "fp8"),
    ],
)
def test_why_nothing_is_folded(overrides, how, words):
    line = line_of("relora.product=folded", *overrides, **how)
    assert line.startswith("product: separate, because ") and words in line


@pytest.mark.parametrize("method", [["method=full"], ["method=lora", "lora.base=none"]])
def test_nothing_is_said_without_low_rank_updates_of_a_weight(method):
    assert line_of(*method) is None
