"""What a run shows beside the losses: texts, update norms, TensorBoard; and that looking changes nothing."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora_ds import data
from relora_ds.config import RecipeError, load_recipe
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.training.hooks.console import moments_text, sample_line
from relora_ds.training.metrics_log import MetricsLog, read_metrics
from relora_ds.training.samples import Sample, continuations, draw_samples, first_documents
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import llama
from tests.training.runs import lines, losses, run
from tests.zero.restarts import frozen_masters

CPU = torch.device("cpu")
# Cycles end after steps 20, 30, 40 and 50; on schedule are evaluations after steps 25 and 50.
SETTINGS = ("deepspeed=zero3", "train.steps=50", "eval.every=25")


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """The run directory of one tiny run at ZeRO-3 on two ranks, with two samples per evaluation."""
    directory = tmp_path_factory.mktemp("runs") / "observed"
    run(directory, *SETTINGS, "eval.samples=2", "checkpoint.every=27")
    return directory


@pytest.fixture(scope="module")
def resumed(observed, tmp_path_factory):
    """The run directory of its steps from 28 on, without samples."""
    directory = tmp_path_factory.mktemp("runs") / "resumed"
    run(directory, *SETTINGS, f"resume={observed}/checkpoints/step_00000027")
    return directory


@pytest.fixture(scope="module")
def board(observed):
    """What TensorBoard reads of it."""
    accumulator = EventAccumulator(str(observed / "tensorboard"))
    accumulator.Reload()
    return accumulator


# -- evaluations -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluations_within_a_phase_may_take_a_part_of_the_tokens(observed, tmp_path):
    run(tmp_path / "part", *SETTINGS, "eval.max_tokens=100")
    whole = len(data.prepare(load_recipe(str(observed / "recipe.yaml")).data).validation) - 1
    evaluations = {line["step"]: line for line in lines(tmp_path / "part", "eval")}
    ends = {line["step"]: line for line in lines(observed, "eval") if line["step"] in (10, 50)}
    assert {step for step, line in evaluations.items() if line["val_tokens"] == whole} == {10, 50} == set(ends)
    assert all(64 <= line["val_tokens"] <= 164 for step, line in evaluations.items() if step not in ends)
    assert all(evaluations[step]["val_loss"] == ends[step]["val_loss"] for step in ends)
    middle, around = evaluations[25], evaluations[50]
    assert middle["bits_per_byte"] / middle["val_loss"] == pytest.approx(around["bits_per_byte"] / around["val_loss"])


# -- text samples ----------------------------------------------------------------------------------------------------


def test_samples_do_not_disturb_training(observed, resumed):
    """The one draws samples in the evaluations at 40 and 50, the other does not."""
    seeing, blind = lines(observed, "eval")[-2:], lines(resumed, "eval")
    assert all(line["samples"] for line in seeing) and all(line["samples"] == [] for line in blind)
    assert losses(resumed) == {step: loss for step, loss in losses(observed).items() if step > 27}
    for key in ("step", "val_loss", "ppl"):
        assert [e[key] for e in blind] == [e[key] for e in seeing]
    seeing, blind = (load_file(d / "export" / "model.safetensors") for d in (observed, resumed))
    assert all(torch.equal(seeing[name], blind[name]) for name in seeing)


def test_the_samples_are_what_the_exported_model_writes(observed):
    """Wrapped layers under ZeRO-3 on two ranks against a plain transformers model."""
    recipe = load_recipe(str(observed / "recipe.yaml"))
    prepared = data.prepare(recipe.data)
    model = AutoModelForCausalLM.from_pretrained(observed / "export")
    tokenizer = AutoTokenizer.from_pretrained(observed / "export")
    prompts = first_documents(prepared.validation, prepared.eos_id, 2, recipe.data.seq_len)
    expected = draw_samples(model, tokenizer, prompts, seq_len=recipe.data.seq_len, seed=recipe.seed, device=CPU)
    evaluations = lines(observed, "eval")
    assert evaluations[-1]["samples"] == [vars(sample) for sample in expected]
    assert evaluations[0]["samples"] != evaluations[-1]["samples"]
    text = tokenizer.decode(prepared.validation[:200].tolist())
    assert text.startswith(expected[0].prompt) and expected[0].prompt != expected[1].prompt
    assert all(sample.text for sample in expected)


def test_drawing_touches_no_random_number_and_leaves_the_mode():
    model, prompts = llama().train(), torch.arange(12).view(2, 6)
    state = torch.get_rng_state()
    first = continuations(model, prompts, num_tokens=8, seed=3, device=CPU)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[:, :6], prompts) and first.shape == (2, 14)
    assert torch.equal(first, continuations(model, prompts, num_tokens=8, seed=3, device=CPU))
    assert not torch.equal(first, continuations(model, prompts, num_tokens=8, seed=4, device=CPU))


def test_what_is_not_written_yet_has_no_influence():
    """The loop of fixed length equals one that feeds only what there is."""
    model, prompts = llama().eval(), torch.arange(12).view(2, 6)
    generator, ids = torch.Generator().manual_seed(3), prompts
    for _ in range(8):
        with torch.no_grad():
            best, choice = (model(input_ids=ids).logits[:, -1] / 0.8).topk(40)
        ids = torch.cat([ids, choice.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator))], dim=1)
    assert torch.equal(ids, continuations(model, prompts, num_tokens=8, seed=3, device=CPU))


def test_a_network_that_diverged_still_writes():
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert continuations(model, torch.arange(6).view(1, 6), num_tokens=4, seed=0, device=CPU).shape == (1, 10)


@pytest.mark.parametrize(
    "tokens, num, prompts",
    [
        ([1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 9, 0], 2, [[1, 2, 3, 4], [6, 7, 8, 9]]),
        ([1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 9, 0], 1, [[1, 2, 3, 4]]),
        ([1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 9, 0], 0, []),
        ([1, 2, 0, 0, 6, 7, 8, 9], 5, [[6, 7, 8, 9]]),  # a short and an empty document are passed over
        ([1, 2, 0, 3, 0, 4, 5, 0], 2, [[1, 2], [4, 5]]),  # none is long enough: the longest ones
        ([1, 2, 3, 4, 5], 1, [[1, 2, 3, 4]]),  # no end of a document
        ([0, 0, 0], 1, []),
    ],
)
def test_prompts_are_the_beginnings_of_documents(tokens, num, prompts):
    found = first_documents(np.array(tokens, dtype=np.uint16), 0, num, seq_len=8)
    assert found.dtype == torch.int64 and found.tolist() == prompts


def test_a_text_ends_where_the_document_does(observed):
    tokenizer = AutoTokenizer.from_pretrained(observed / "export")
    prompt = tokenizer("An expression", add_special_tokens=False)["input_ids"]
    more = tokenizer(" list", add_special_tokens=False)["input_ids"]

    class Parrot(torch.nn.Module):
        """Says `more`, ends the document, and goes on."""

        def forward(self, input_ids):
            said = [*prompt, *more, tokenizer.eos_token_id, *more, *more]
            logits = torch.nn.functional.one_hot(torch.tensor([said[1 : input_ids.shape[1] + 1]]), len(tokenizer)) * 1e4
            return type("Output", (), {"logits": logits})

    (sample,) = draw_samples(
        Parrot(), tokenizer, torch.tensor([prompt]), seq_len=len(prompt) + 2 * len(more) + 1, seed=0, device=CPU
    )
    assert (sample.prompt.strip(), sample.text) == ("An expression", " list")


def test_a_sample_is_one_line_for_a_person():
    line = sample_line(Sample("a\nlong prompt " * 20, "\n\nfirst\tline\nsecond " * 20), 80)
    assert "\n" not in line and "\t" not in line and len(line) == 80
    assert line.startswith("  sample: …") and " >> first line second" in line and line.endswith("…")
    assert sample_line(Sample("It", " is."), 80) == "  sample: It >> is."


def test_a_restart_says_what_it_did_to_the_moments():
    assert moments_text("magnitude_joint", 0.98765) == "98.77 % of the moments pruned"
    assert [moments_text(reset, 0.0) for reset in ("none", "rotate")] == ["moments kept", "moments rotated"]


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(RecipeError, match="eval.samples: -1 is not an integer of at least 0"):
        load_recipe("tiny", ["eval.samples=-1"])


# -- when to evaluate -------------------------------------------------------------------------------------------------


def test_every_cycle_is_evaluated_once_at_least(observed):
    # 10: the warm start's end; 20: its cycle had none; 25: on schedule, so not at 30; 40: its cycle had none; 50: both.
    assert [line["step"] for line in lines(observed, "eval")] == [10, 20, 25, 40, 50]


def test_a_resumed_run_evaluates_when_the_whole_one_would(resumed):
    assert [line["step"] for line in lines(resumed, "eval")] == [40, 50]


# -- norms of the updates ---------------------------------------------------------------------------------------------


def norms_of_a_restart(stage: int, precision: str) -> list[dict[str, float]]:
    """[norms, relative norms] that a restart reports, checked on this rank against the dense products."""
    engine = cases.build(stage, precision=precision)
    for step in range(6):
        cases.train_step(engine, step)
    factors, weights = cases.gathered_state(engine)["master"], frozen_masters(engine)
    done = engine.restart()
    assert list(done.update_norms) == list(done.relative_update_norms) == list(lowrank_layers(engine.module))
    for name, norm in done.update_norms.items():
        update = cases.SCALING * factors[f"{name}.lora_B"].double() @ factors[f"{name}.lora_A"].double()
        assert norm == pytest.approx(update.norm().item(), rel=1e-6) and norm > 1e-3
        assert done.relative_update_norms[name] == pytest.approx(
            (update.norm() / weights[name].double().norm()).item(), rel=1e-6
        )
    cases.release(engine)
    return [done.update_norms, done.relative_update_norms]


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_update_norms_are_those_of_the_dense_product(stage, precision):
    first, second = ranks(2).run(norms_of_a_restart, stage, precision)
    assert first == second, "the ranks disagree"


def test_metrics_hold_the_norms_of_every_layer(observed):
    layers = {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    for line in lines(observed, "restart"):
        assert set(line["update_norms"]) == set(line["relative_update_norms"]) == layers
        assert all(norm > 0 for norm in line["update_norms"].values())


def test_cumulative_bytes_end_at_the_summarys(observed):
    last, summary = lines(observed, "train")[-1], json.loads((observed / "summary.json").read_text())
    assert last["total_bytes_wire"] == summary["bytes_wire"] > 0
    assert last["full_rank_bytes_wire"] == summary["full_rank_bytes_wire"]


# -- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_sensible_groups(board, observed):
    scalars = board.Tags()["scalars"]
    assert {
        "loss/train",
        "loss/validation",
        "perplexity/per_token",
        "optim/lr",
        "optim/grad_norm",
        "speed/tokens_per_s",
        "traffic/total_bytes_wire",
        "memory/peak_bytes",
        "restart/prune_fraction_m",
        "restart/merge_drift",
        "update_norm/model.layers.0.mlp.up_proj",
        "update_norm_relative/model.layers.1.self_attn.q_proj",
    } <= set(scalars)
    assert {tag.split("/")[0] for tag in scalars} == {
        "loss",
        "perplexity",
        "optim",
        "progress",
        "speed",
        "traffic",
        "memory",
        "restart",
        "update_norm",
        "update_norm_relative",
        "parameters",
        "checkpoint",
    }
    points = board.Scalars("loss/train")
    assert [p.step for p in points] == list(range(1, 51))
    assert [p.value for p in points] == pytest.approx(list(losses(observed).values()))
    norm = lines(observed, "restart")[0]["update_norms"]["model.layers.0.mlp.up_proj"]
    assert board.Scalars("update_norm/model.layers.0.mlp.up_proj")[0].value == pytest.approx(norm)


def test_tensorboard_shows_the_recipe_and_the_samples(board, observed):
    def texts(tag):
        return [(e.step, e.tensor_proto.string_val[0].decode()) for e in board.Tensors(f"{tag}/text_summary")]

    ((_, recipe),) = texts("recipe")
    assert "    method: relora" in recipe.splitlines()
    assert [step for step, _ in texts("samples")] == [10, 20, 25, 40, 50]
    sample = lines(observed, "eval")[-1]["samples"][1]
    shown = texts("samples")[-1][1]
    assert all(line in shown for line in (sample["prompt"] + "\n" + sample["text"]).splitlines())


def test_json_says_null_where_a_number_is_not_finite(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(
        "restart", step=1, t=1, phase="relora", merge_loss=float("nan"), update_norms={"a": float("inf"), "b": 1.0}
    )
    log.close()
    (line,) = read_metrics(tmp_path)
    assert line["update_norms"] == {"a": None, "b": 1.0} and line["merge_loss"] is None
