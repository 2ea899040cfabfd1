"""The shipped presets and recipes say what they are, and `extends` lays one recipe over another."""

import re
import shlex

import pytest

from relora_ds.config import (
    PACKAGE_DIR,
    ModelConfig,
    RecipeError,
    ReLoRAConfig,
    accumulation_steps,
    load_recipe,
    method_of,
    no_effect,
    preset_names,
    recipe_files,
    recipe_names,
)
from relora_ds.lowrank.wrap import count_parameters, is_lora_parameter, target_linears, wrap
from relora_ds.models.build import build_config, meta_model
from tests import recipe_figures

# hidden, feed-forward, heads, layers: the authors' configuration files (the paper's Table 1 for 60M to 350M), with a
# feed-forward of 5504 in 1b_aligned; and the parameters that the name promises.
PRESETS = {
    "llama_9m": (128, 352, 4, 4, 9e6),
    "llama_20m": (256, 688, 4, 4, 20e6),
    "llama_35m": (384, 1024, 8, 6, 35e6),
    "llama_40m": (416, 1024, 8, 8, 40e6),
    "llama_60m": (512, 1376, 8, 8, 60e6),
    "llama_71m": (512, 1368, 8, 12, 71e6),
    "llama_100m": (640, 1708, 10, 12, 100e6),
    "llama_130m": (768, 2048, 12, 12, 130e6),
    "llama_250m": (768, 2560, 16, 24, 250e6),
    "llama_350m": (1024, 2736, 16, 24, 350e6),
    "llama_1b": (2048, 5461, 32, 24, 1.3e9),
    "llama_1b_aligned": (2048, 5504, 32, 24, 1.3e9),
    "llama_3b": (2560, 6848, 32, 32, 3e9),
    "llama_7b": (4096, 11008, 32, 32, 7e9),
}
# The vocabulary of the authors' configuration files in 2023's paper and 2026's, without T5's extra ids.
PAPER_VOCABULARY = 32_000

METHODS = ("full", "control", "lora", "relora")

# Table 1 of arXiv 2307.05695v3: learning rate, sequences × length, tokens; and the restarts that these leave room for
# after a warm start of 5,000 steps, with one every 5,000.
PAPER_TABLE = {
    "60m": (1e-3, 480, 256, 1.2e9, 0),
    "130m": (1e-3, 600, 256, 2.6e9, 2),
    "250m": (5e-4, 1152, 512, 6.8e9, 1),
    "350m": (5e-4, 1152, 512, 6.8e9, 1),
}


def network(preset, vocabulary=PAPER_VOCABULARY):
    return meta_model(build_config(ModelConfig(preset=preset), vocabulary, 512))


def test_presets_are_the_table_and_nothing_else():
    assert set(preset_names()) == {"tiny", *PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_shapes_and_sizes(name):
    hidden, feed_forward, heads, layers, promised = PRESETS[name]
    model = network(name)
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers) == (
        hidden,
        feed_forward,
        heads,
        layers,
    )
    assert not config.tie_word_embeddings and config.num_key_value_heads == heads
    by_hand = 2 * PAPER_VOCABULARY * hidden + layers * (4 * hidden**2 + 3 * hidden * feed_forward + 2 * hidden) + hidden
    assert count_parameters(model)[1] == by_hand
    assert by_hand == pytest.approx(promised, rel=0.11)


# What github.com/NamrataRShivagunde/low-rank-geometry (the authors of ReLoRA, 2026) notes of its runs' logs in
# training/training_bash_scripts/6_relora: parameters that train, and all, in millions.
@pytest.mark.parametrize(
    ("preset", "r", "trainable", "total"), [("llama_60m", 128, 42.77, 68.07), ("llama_130m", 256, 94.00, 178.93)]
)
def test_as_many_parameters_train_as_in_the_authors_code(preset, r, trainable, total):
    model = wrap(network(preset), ReLoRAConfig(r=r))
    counts = count_parameters(model)
    assert [round(n / 1e6, 2) for n in counts] == [trainable, total]


@pytest.mark.parametrize("preset", ["llama_60m", "llama_130m", "llama_250m", "llama_350m", "llama_1b"])
def test_what_counts_as_trainable(preset):
    """A and B of every attention and feed-forward linear, embeddings, output head and norms: the paper's section 4."""
    hidden, feed_forward, _, layers, _ = PRESETS[preset]
    plain = network(preset)
    assert len(target_linears(plain, ReLoRAConfig())) == 7 * layers
    model = wrap(plain, ReLoRAConfig(r=128))
    lora = sum(p.numel() for name, p in model.named_parameters() if is_lora_parameter(name))
    assert lora == layers * 128 * (4 * 2 * hidden + 3 * (hidden + feed_forward))
    assert count_parameters(model)[0] == lora + 2 * PAPER_VOCABULARY * hidden + (2 * layers + 1) * hidden


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_its_header_states_its_figures(name):
    recipe = load_recipe(name, check_files=False)  # mini's text is collected by a script
    expected = ["has no restart"] if name == "llama_60m_relora" else []
    warnings = no_effect.warnings(recipe)
    assert len(warnings) == len(expected) and all(map(str.__contains__, warnings, expected)), warnings
    sentence = recipe_figures.figures(name).sentence()
    assert sentence in recipe_figures.header(name), f"say in the header (python -m tests.recipe_figures): {sentence}"


@pytest.mark.parametrize("name", recipe_names())
def test_commands_in_a_header_are_commands(name):
    text = (PACKAGE_DIR / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    commands = re.findall(r"^#.*train\.py (.*)$", text, flags=re.MULTILINE)
    if name != "tiny":
        assert f"--config {name}" in commands[0]
    tries = re.findall(r"A short try: ([^#]*?)\. ", text)
    for command in [*commands, *(f"--config {name} {options}" for options in tries)]:
        option, recipe, *overrides = shlex.split(command)
        assert option == "--config"
        load_recipe(recipe, overrides, check_files=False)


DEMOS = [name for name in recipe_names() if name == "quickstart" or name.split("_")[0] in ("tiny", "mini", "small")]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in DEMOS])
def test_a_recipe_reads_its_data_once_and_fits_1_2_4_and_8_ranks(name):
    recipe = load_recipe(name)
    tokens = recipe.total_steps * recipe.tokens_per_step
    # Unpacked, a sequence takes a whole document, of which C4's have more tokens than its 256.
    most = 1.002 * tokens if recipe.data.packing else 2 * tokens
    assert recipe.data.source == "c4" and tokens <= recipe.data.max_tokens < most
    assert [accumulation_steps(recipe, n) * n for n in (1, 2, 4, 8)] == [accumulation_steps(recipe, 1)] * 4
    assert recipe.data.vocab_size == recipe_figures.VOCABULARIES[recipe.data.tokenizer]
    longest = getattr(recipe_figures.network(recipe), "max_position_embeddings", 0)
    assert recipe.data.seq_len <= longest


@pytest.mark.parametrize("size", PAPER_TABLE)
def test_the_papers_table(size):
    lr, sequences, length, tokens, restarts = PAPER_TABLE[size]
    full, control, lora, relora = (load_recipe(f"llama_{size}_{method}") for method in METHODS)
    for recipe, method in zip((full, control, lora, relora), METHODS, strict=True):
        assert (recipe.method, recipe.model.preset) == (method, f"llama_{size}")
        assert (recipe.batch_sequences, recipe.data.seq_len, recipe.train.tokens) == (sequences, length, tokens)
        assert (recipe.optim.warmup_steps, recipe.optim.min_lr_ratio, recipe.seed) == (500, 0.1, full.seed)
        assert recipe.relora.r == 128
    assert [recipe.optim.lr for recipe in (full, control, lora)] == [lr] * 3
    assert (relora.optim.lr, relora.optim.warm_start_lr) == (2 * lr, lr)
    assert (lora.lora.base, method_of(lora).full_rank_steps, lora.relora.lora_alpha) == ("none", 0, 32)
    assert (relora.warm_start_steps, method_of(relora).num_restarts) == (5000, restarts)
    r = relora.relora
    assert (r.restart_every, r.restart_warmup_steps, r.reset_ratio, r.lora_alpha) == (5000, 100, 0.99, 32)
    assert r.optimizer_reset == "magnitude_joint"

    longer = load_recipe(f"llama_{size}_relora_20k")
    assert (longer.total_steps, longer.train.tokens, method_of(longer).num_restarts) == (20_000, None, 2)
    assert (longer.relora, longer.optim, longer.batch_sequences) == (r, relora.optim, sequences)


def test_the_billion_and_the_lineage_of_2026():
    full, control, lora, relora = (load_recipe(f"llama_1b_{method}") for method in METHODS)
    assert len({recipe.total_steps for recipe in (full, control, lora, relora)}) == 1
    assert all(
        (recipe.batch_sequences, recipe.data.seq_len) == (1024, 2048)
        and recipe.optim.betas == [0.9, 0.95]
        and recipe.optim.weight_decay == 0.01
        for recipe in (full, control, lora, relora)
    )
    assert (relora.relora.r, relora.relora.restart_every, relora.optim.lr) == (128, 1000, 4e-4)
    recent = load_recipe("llama_130m_relora_2026")
    assert (
        recent.relora.r,
        recent.optim.lr,
        recent.relora.restart_every,
        recent.relora.optimizer_reset,
        recent.relora.reset_ratio,
        recent.relora.restart_warmup_steps,
        recent.optim.max_grad_norm,
        recent.total_steps,
        method_of(recent).num_restarts,
    ) == (256, 1e-3, 5000, "random", 0.99, 100, 1.0, 20_000, 3)
    assert (method_of(recent).full_rank_steps, recent.optim.warm_start_lr) == (0, None)


def test_the_document_lists_every_recipe_with_its_figures():
    text = recipe_figures.DOCUMENT.read_text(encoding="utf-8")
    shown = text.split(recipe_figures.BEGIN)[1].split(recipe_figures.END)[0].strip()
    assert shown == recipe_figures.table(), "docs/reference/recipes.md is stale: python -m tests.recipe_figures"


# -- extends ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(name, text)`: a recipe file; the tests stand in another directory than the files."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def problems_of(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_values_lie_over_those_of_the_extended_recipe_leaf_by_leaf(write, tmp_path):
    write("shared/base.yaml", "extends: tiny\nrelora: {r: 8, target_modules: [q_proj, v_proj]}\nrun_dir: runs/base\n")
    path = write("mine.yaml", "extends: shared/base.yaml\nrelora: {lora_alpha: 16, target_modules: [q_proj]}\n")
    recipe, tiny = load_recipe(path, ["seed=7"]), load_recipe("tiny")
    assert (recipe.relora.r, recipe.relora.lora_alpha, recipe.seed) == (8, 16, 7)
    assert recipe.relora.target_modules == ["q_proj"]  # a list is one value
    assert recipe.relora.restart_every == tiny.relora.restart_every and recipe.data == tiny.data
    assert recipe.run_dir == "runs/mine"  # two runs never share a directory because one extends the other
    assert load_recipe(path.parent / "shared/base.yaml").run_dir == "runs/base"
    assert recipe_files(path) == [path, path.parent / "shared/base.yaml", PACKAGE_DIR / "recipes/tiny.yaml"]
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert "extends" not in recipe.to_yaml() and load_recipe(tmp_path / "resolved.yaml") == recipe


def test_how_a_run_is_started_is_not_inherited(write):
    write("base.yaml", "extends: tiny\nseed: 3\noverwrite: true\n")
    write("older.yaml", "extends: tiny\nresume: auto\n")
    for parent in ("base", "older"):
        recipe = load_recipe(write("mine.yaml", f"extends: {parent}.yaml\n"))
        assert recipe.overwrite is False and recipe.resume is False
    assert load_recipe(write("mine.yaml", "extends: base.yaml\noverwrite: true\n")).overwrite is True
    assert load_recipe("tiny", ["resume=auto"]).resume == "auto"


def test_a_file_named_like_a_shipped_recipe_may_extend_it(write):
    path = write("quickstart.yaml", "extends: quickstart\nseed: 3\n")
    assert load_recipe(path).seed == 3 and load_recipe(path).relora == load_recipe("quickstart").relora


@pytest.mark.parametrize(
    ("section", "below", "above", "expected"),
    [
        (
            "train",
            "steps: 40, batch_sequences: 8",
            "tokens: 4096",
            {"steps": None, "tokens": 4096, "batch_sequences": 8},
        ),
        ("train", "tokens: 4096, batch_sequences: 8", "steps: 40", {"steps": 40, "tokens": None}),
        ("train", "steps: 40, batch_sequences: 8", "batch_tokens: 512", {"batch_sequences": None, "batch_tokens": 512}),
        ("train", "steps: 40, batch_tokens: 512", "batch_sequences: 16", {"batch_sequences": 16, "batch_tokens": None}),
        ("train", "steps: 40, batch_sequences: 8", "tokens: null", {"steps": 40, "tokens": None}),
        ("model", "preset: tiny", "name_or_path: gpt2", {"preset": None, "name_or_path": "gpt2"}),
        ("model", "name_or_path: gpt2", "preset: llama_9m", {"preset": "llama_9m", "name_or_path": None}),
    ],
)
def test_one_of_a_pair_replaces_the_other(write, section, below, above, expected):
    rest = {"train": "model: {preset: tiny}", "model": "train: {steps: 40, batch_sequences: 8}"}[section]
    base = write(
        "base.yaml",
        f"{rest}\n{section}: {{{below}}}\noptim: {{warmup_steps: 1}}\nmethod: full\ndata: {{seq_len: 64}}\n",
    )
    child = write("child.yaml", f"extends: base.yaml\n{section}: {{{above}}}\n")
    overrides = [f"{section}.{part.strip().replace(': ', '=')}" for part in above.split(",")]
    for recipe in (load_recipe(child), load_recipe(base, overrides)):
        values = vars(getattr(recipe, section))
        assert {key: values[key] for key in expected} == expected


def test_one_source_that_sets_both_of_a_pair_is_a_mistake(write):
    child = write("child.yaml", "extends: tiny\ntrain: {steps: 30, tokens: 4096}\n")
    assert problems_of(child) == ["train.steps: 30 and train.tokens: 4096 are both set; set one of them to null"]
    assert problems_of("tiny", "train.steps=30", "train.tokens=4096") == problems_of(child)
    assert load_recipe(child, ["train.steps=35"]).train.tokens is None  # the command line has the last word


def test_problems_of_all_files_and_overrides_come_at_once(write):
    write("base.yaml", "extends: tiny\nrelora: {rr: 8}\ndata: 5\n")
    path = write("child.yaml", "extends: base.yaml\nseed: x\n")
    found = problems_of(path, "optim.lr=-1")
    assert sorted(message.split(":")[0] for message in found) == ["data", "optim.lr", "relora.rr", "seed"], found


def test_what_cannot_be_extended(write, tmp_path):
    path = write("a.yaml", "extends: b.yaml\nnonsense: 1\n")
    first, second = problems_of(path)
    assert first.startswith(f"extends: no file '{tmp_path}/b.yaml', and no shipped recipe of that name; shipped: ")
    assert second == "nonsense: unknown key; remove it"  # and nothing about what the missing file would have set
    write("b.yaml", "extends: sub/c.yaml\n")
    write("sub/c.yaml", "extends: ../a.yaml\n")
    (found,) = [message for message in problems_of(path) if "circle" in message]
    assert found == (
        f"extends: {tmp_path}/a.yaml -> {tmp_path}/b.yaml -> {tmp_path}/sub/c.yaml -> "
        f"{tmp_path}/sub/../a.yaml goes round in a circle; remove one extends"
    )
    (found,) = problems_of(write("self.yaml", "extends: self.yaml\n"))
    assert "self.yaml goes round in a circle" in found
    (found,) = problems_of(write("near.yaml", "extends: quikstart\n"))
    assert "did you mean quickstart?" in found
    (found,) = problems_of(write("list.yaml", "extends: [tiny, quickstart]\n"))
    assert "list.yaml is neither a recipe's name nor a path" in found
    write("broken.yaml", "train: [1\n")
    (found,) = problems_of(write("of_broken.yaml", "extends: broken.yaml\n"))
    assert "broken.yaml is not a readable YAML recipe" in found
    assert problems_of("tiny", "extends=quickstart") == [
        "extends: 'quickstart' is no override; write it into a recipe file"
    ]
    assert (
        load_recipe(
            write(
                "none.yaml",
                "extends: null\nmodel: {preset: tiny}\nmethod: full\ntrain: {steps: 10, "
                "batch_sequences: 8}\noptim: {warmup_steps: 1}\n",
            )
        ).total_steps
        == 10
    )
