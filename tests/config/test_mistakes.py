"""Mistakes in a recipe: all at once, each with its field, value and remedy."""

import dataclasses

import pytest

from relora_ds.config import RecipeError, ReLoRAConfig, load_recipe

pytestmark = pytest.mark.usefixtures("base_recipe")


def problems_of(*overrides: str, recipe: str = "base.yaml") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, list(overrides))
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def only_problem(*overrides: str, recipe: str = "base.yaml") -> str:
    found = problems_of(*overrides, recipe=recipe)
    assert len(found) == 1, found
    return found[0]


def test_all_errors_at_once():
    found = problems_of(
        "method=relra",
        "train.step=5",
        "optim.lr=-1",
        "eval.every=often",
        "relora.reset_ratio=1.5",
        "relora=5",
        "foo",
        "optim.betas=[0.9,x]",
        "seed=null",
        "activation_checkpointing=some",
        "relora.r=0",
        "deepspeed=zero7",
        "data.source=c5",
        "lr=3",
    )
    expected = [
        "relora: 5 where a section",
        "override 'foo' is not section.key=value",
        "train.step: unknown key; did you mean train.steps?",
        "eval.every: 'often' is not an integer or null",
        "optim.betas: [0.9, 'x'] is not a list of numbers; the default is [0.9, 0.999]",
        "seed: null is not an integer; the default is 0",
        "lr: unknown key; did you mean optim.lr?",
        "method: 'relra' is unknown (did you mean relora?)",
        "optim.lr: -1.0 is not a number above 0",
        "relora.reset_ratio: 1.5 is outside [0, 1); use e.g. 0.99",
        "relora.r: 0 is not an integer of at least 1",
        "data.source: 'c5' is unknown; use one of wikitext2",
        "activation_checkpointing: 'some' is unknown",
        "deepspeed: zero7 is neither a file nor a shipped configuration (did you mean zero",
    ]
    for start in expected:
        assert sum(problem.startswith(start) for problem in found) == 1, (start, found)
    assert len(found) == len(expected), found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=sst", "sst.r=4"], "sst.r: unknown key; did you mean relora.r?"),
        (["train.steps=600", "train.tokens=1000"], "train.steps: 600 and train.tokens: 1000 are both set"),
        (["train.steps=null"], "train.steps and train.tokens: neither is set"),
        (
            ["train.batch_tokens=2048", "train.batch_sequences=16"],
            "train.batch_sequences: 16 and train.batch_tokens: 2048 are both set",
        ),
        (
            ["train.batch_sequences=12"],
            "train.batch_sequences: 12 (12 sequences of data.seq_len 128) is not a multiple "
            "of train.micro_batch_size 8; use train.batch_sequences=8 or "
            "train.batch_sequences=16",
        ),
        (
            ["train.batch_sequences=null", "train.batch_tokens=2000"],
            "train.batch_tokens: 2000 is not a multiple of data.seq_len 128; use train.batch_tokens=1024 or "
            "train.batch_tokens=2048",
        ),
        (["train.steps=100"], "warm_start_steps: 100 leaves no low-rank steps"),
        (["relora.restart_every=15"], "relora.restart_every: 15 is not above optim.warmup_steps 20"),
        (["relora.restart_every=0"], "relora.restart_every: 0 is not an integer of at least 2"),
        (["relora.restart_warmup_steps=125"], "relora.restart_every: 125 is not above relora.restart_warmup_steps 125"),
        (
            ["optim.warmup_steps=124", "relora.restart_every=null", "train.steps=224"],
            "optim.warmup_steps: 124 is not below the 124 low-rank steps",
        ),
        (["optim.betas=[0.9]"], "optim.betas: [0.9] is not two numbers inside [0, 1)"),
        (["optim.lr=.nan"], "optim.lr: nan is not a number above 0"),
        (["optim.min_lr_ratio=2"], "optim.min_lr_ratio: 2.0 is outside [0, 1]"),
        (["warm_start_method=fill"], "warm_start_method: 'fill' is unknown (did you mean full?)"),
        (["warm_start_method=control"], "warm_start_method: control trains a network of another shape, whose weights"),
        (["warm_start_method=relora"], "warm_start_method: relora trains as method relora does after it; use warm_"),
        (
            ["warm_start_method=lora", "relora.restart_every=null"],
            "warm_start_method: lora trains as method relora does after it; use warm_start_steps=0, or another one",
        ),
        (
            ["method=lora", "lora.base=warm_start", "warm_start_method=relora", "relora.restart_every=20"],
            "warm_start_method: relora restarts every 20 steps, not above the 20 of its warm-up; use e.g. optim.warm_",
        ),
        (["optim.schedule=wds"], "optim.schedule: 'wds' is unknown (did you mean wsd?); known: cosine, wsd, constant"),
        (["optim.schedule=wsd", "optim.decay_steps=0"], "optim.decay_steps: 0 is not an integer of at least 1"),
        (
            ["optim.schedule=wsd", "relora.restart_every=null", "optim.decay_steps=481"],
            "optim.decay_steps: 481 of 500 steps begins the decay after step 19, before the warm-up ends "
            "(optim.warmup_steps 20); use optim.decay_steps=480 or less",
        ),
        (
            ["optim.schedule=wsd", "optim.decay_steps=116"],  # 500 low-rank steps, the last restart after 375 of them
            "optim.decay_steps: 116 of 500 steps begins the decay after step 384, before the ramp of the restart after "
            "step 375 ends (relora.restart_every 125, relora.restart_warmup_steps 10); use optim.decay_steps=115 or "
            "less, or relora.restart_warmup_steps=0",
        ),
        (
            ["optim.schedule=wsd", "relora.restart_every=49", "relora.restart_warmup_steps=12"],
            "optim.decay_steps: 50 (the default, a tenth) of 500 steps begins the decay after step 450, before the "
            "ramp of the restart after step 490 ends (relora.restart_every 49, relora.restart_warmup_steps 12); use "
            "relora.restart_warmup_steps=0",
        ),
        (["relora.lora_dropout=1"], "relora.lora_dropout: 1.0 is outside [0, 1)"),
        (["relora.lora_alpha=0"], "relora.lora_alpha: 0.0 is not a number above 0"),
        (["relora.optimizer_reset=magnitude_jnt"], "did you mean magnitude_joint?"),
        (["relora.frozen_dtype=nf8"], "relora.frozen_dtype: 'nf8' is unknown (did you mean nf4?); known: auto, fp32"),
        (["relora.frozen_master=gpu"], "relora.frozen_master: 'gpu' is unknown (did you mean cpu?)"),
        (["relora.frozen_placement=shared"], "relora.frozen_placement: 'shared' is unknown (did you mean sharded?)"),
        (["relora.target_modules=(q_proj"], "'(q_proj' is neither a list of names nor a regular expression"),
        (["relora.exclude_modules=(lm"], "relora.exclude_modules: '(lm' is neither a list of names nor a reg"),
        (["log.to=[wandb, tensorbord]"], "log.to: 'tensorbord' is unknown (did you mean tensorboard?); known: tensorb"),
        (["log.to=[wandb, wandb]"], "log.to: ['wandb', 'wandb'] names a logger twice"),
        (["model.preset=llama_60"], "model.preset: 'llama_60' is unknown (did you mean llama_60m?)"),
        (
            ["model.name_or_path=gpt2", "model.preset=tiny"],
            "model.preset: tiny and model.name_or_path: gpt2 are both set",
        ),
        (["model.init=pretrained"], "model.init: pretrained needs model.name_or_path"),
        (["activation_checkpointing=ful"], "activation_checkpointing: 'ful' is unknown (did you mean full?)"),
        (["data.source=c4"], "data.max_tokens: null, and c4"),
        (["data.source=pretokenized"], "data.path: null, and data.source pretokenized reads it"),
        (["data.source=jsonl"], "JSON lines and parquet are read by data.source=text"),
        (["data.source=./gone"], "data.source: ./gone does not exist"),
        (["init_from=gpt2"], "init_from: gpt2 together with warm_start_steps: 100 is not supported"),
        (["data.source=text"], "data.path: null, and data.source text reads it"),
        (["data.source=text", "data.path=no/such.txt"], "data.path: no/such.txt does not exist"),
        (["data.validation=1.5"], "data.validation: 1.5 is outside (0, 1)"),
        (["data.vocab_size=256"], "data.vocab_size: 256 is not above 260"),
        (["data.max_tokens=10"], "data.max_tokens: 10 does not hold one sequence of data.seq_len 128"),
        (["data.text_column=body"], "data.text_column: body has no effect with data.source wikitext2; remove it"),
        (["data.packing=maskd"], "data.packing: 'maskd' is unknown (did you mean masked?); known: true, false, masked"),
        (["data.path=x"], "data.path: x is not read with data.source wikitext2; use data.source=text"),
        (["data.tokenizer=a/b/c"], "data.tokenizer: a/b/c does not exist"),
        (["resume=true"], "resume: true is neither false, auto nor a checkpoint's path; use resume=auto"),
        (["resume=auto", "overwrite=true"], "overwrite: true would delete the run"),
        (
            ["method=lora", "lora.base=warm_start", "warm_start_steps=0"],
            "lora.base: warm_start has nothing to start from",
        ),
        (["train.tokens=1.5", "train.steps=null"], "train.tokens: 1.5 is not an integer or null"),
        (["relora.target_modules=[a"], "relora.target_modules: '[a' is neither a list of names"),
    ],
)
def test_one_mistake_gives_one_message(overrides, expected):
    assert expected in only_problem(*overrides)


def test_recipe_file_mistakes(tmp_path):
    assert "did you mean quickstart?" in only_problem(recipe="quikstart")
    assert problems_of("relora.rr=1", recipe="no_such.yaml")[1].startswith("relora.rr: unknown key")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1\n")
    assert "is not a readable YAML recipe" in only_problem(recipe=str(broken))
    broken.write_text("- 1\n")
    assert "not a mapping" in only_problem(recipe=str(broken))
    broken.write_text("method: full\nmethod: lora\n")
    assert "duplicate key" in only_problem(recipe=str(broken))
    broken.write_text(
        "lora:\nmodel: {preset: tiny}\ntrain: {steps: 10, batch_sequences: 8}\n"
        "relora: {frozen_master: null}\noptim: {warmup_steps: 1}\n"
    )
    recipe = load_recipe(broken)  # an empty section is no mistake, and null is "none" where that is a choice
    assert recipe.relora.frozen_master == "none" and recipe.lora.base == "none"


def test_a_run_is_readable_where_its_data_is_not():
    overrides = ["data.source=text", "data.path=/no/such/file"]
    assert "does not exist" in only_problem(*overrides)
    assert load_recipe("base.yaml", overrides, check_files=False).data.path == "/no/such/file"


def test_relora_config_raises_at_construction_with_everything_that_is_wrong():
    assert ReLoRAConfig().problems() == []
    with pytest.raises(ValueError) as caught:
        ReLoRAConfig(r="8", reset_ratio=1.0, lora_alpha=None, restart_every=100, target_modules=[], use_rslora="no")
    assert [message.split(":")[0] for message in str(caught.value).splitlines()] == [
        "ReLoRAConfig.r",
        "ReLoRAConfig.lora_alpha",
        "ReLoRAConfig.use_rslora",
        "ReLoRAConfig.reset_ratio",
        "ReLoRAConfig.restart_every",
        "ReLoRAConfig.target_modules",
    ]
    with pytest.raises(ValueError, match=r"^ReLoRAConfig\.lora_alpha: 1E\+400 is above 1e\+09"):
        ReLoRAConfig(lora_alpha=10**400)
    with pytest.raises(ValueError, match=r"^ReLoRAConfig\.frozen_dtype: 'int9' is unknown \(did you mean int8\?\)"):
        dataclasses.replace(ReLoRAConfig(), frozen_dtype="int9")


def test_a_recipe_with_a_bad_section_is_read_to_its_end():
    """Reading does not stop at what constructing a ReLoRAConfig would raise."""
    found = problems_of("relora.r=0", "relora.reset_ratio=7", "method=lora", "optim.lr=-1")
    assert [message.split(":")[0] for message in found] == ["relora.r", "relora.reset_ratio", "optim.lr"]
