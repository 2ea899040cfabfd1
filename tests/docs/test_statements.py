"""Sentences of the documentation that were wrong once, each held by what it speaks of."""

import dataclasses
import io
import json
import re
import statistics
import tokenize
from collections import Counter

import pytest
import yaml

from relora_ds.config import IslandsConfig, ReLoRAConfig, load_recipe, recipe_names
from relora_ds.config.schema import ALIASES, CheckpointConfig
from relora_ds.data.gutenberg import NUM_BOOKS
from relora_ds.lab.bench import checkpoint_cost
from relora_ds.methods.galore import GaLore
from relora_ds.planning.network import network_of
from relora_ds.remote import lease
from relora_ds.training.hooks import uploading
from relora_ds.zero.traffic import expected_step
from tests.docs import keys, method_quality, tiny_runs
from tests.docs.generated import fixed_keys
from tests.docs.pages import DOCS, PAGES, ROOT, fenced, name_of
from tests.lab.bench import report
from tests.lab.experiments import overview, results
from tests.small_models import llama


def text_of(page: str) -> str:
    """Return a page in one line."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_the_config_of_galore_is_that_of_the_method():
    (block,) = (one for one in fenced(DOCS / "guides/hf_trainer.md", "python") if "optimizer_reset" in one)
    names = {"ReLoRAConfig": ReLoRAConfig}
    exec(block, names)
    values = {f"relora.{name}": value for name, value in dataclasses.asdict(names["config"]).items()}
    assert GaLore.defaults.items() <= {**values, "relora.restart_every": 200}.items()
    assert f"in its paper {GaLore.defaults['relora.restart_every']}" in block


def test_the_number_of_books():
    assert f"{NUM_BOOKS} books" in text_of("docs/guides/data.md")
    for page in PAGES:
        assert set(re.findall(r"(\d+) books", page.read_text(encoding="utf-8"))) <= {str(NUM_BOOKS)}, page


def test_what_is_sent_at_which_stage():
    sentence = "At ZeRO stages 0 to 2 only what trains is sent between GPUs; stage 3 also gathers `W`"
    assert sentence in text_of("README.md")

    def sent(stage: int, frozen: int) -> float:
        sizes = {"trainable": 1000, "frozen_bytes": frozen, "element_size": 2, "accumulation": 1, "world_size": 4}
        return expected_step(stage, **sizes)[1]

    assert all(sent(stage, 0) == sent(stage, 10_000) for stage in (0, 1, 2))
    assert sent(3, 0) < sent(3, 10_000)


def test_a_resume_on_other_ranks_is_no_reason_to_refuse():
    row = next(line for line in text_of("docs/concepts/comparison.md").split("| ") if line.startswith("yes; also at"))
    assert "`tests/checkpoint/test_moves.py`" in row
    assert "world_size" not in fixed_keys() and "`precision`" not in fixed_keys() and "frozen_dtype" not in fixed_keys()


def test_the_leads_at_toy_size():
    """As docs/concepts/comparison.md and README.md tell them."""
    rows = {row.row.name: row for row in results.measured("tiny", "main")[2]}
    lead = -statistics.mean(rows["ReLoRA"].differences(rows["LoRA, warm start"]))
    behind = statistics.mean(rows["ReLoRA"].differences(rows["full rank"]))
    sentence = f"beats LoRA on the same warm start by {lead:.3f} nats, and full rank beats it by {behind:.3f}"
    assert sentence in text_of("docs/concepts/comparison.md")
    assert all(max(rows["ReLoRA"].differences(rows[other])) < 0 for other in ("LoRA, warm start", "Control"))
    assert "ReLoRA ends below LoRA on the same warm start and below" in text_of("README.md")


def test_the_chain_at_mini():
    """As README.md tells of it."""
    rows, said = {row.row.name: row for row in results.measured("mini", "main")[2]}, text_of("README.md")
    full, chain = rows["full rank"], rows["GaLore, residual"]
    million = {key: full.results[0][key] / 1e6 for key in ("total_parameters", "tokens")}
    assert f"{million['total_parameters']:.1f}M parameters on {million['tokens']:.1f}M tokens of English" in said
    lower = [-gap for gap in overview.per_cent(chain, full)]
    assert f"ends {min(lower):.0f} to {max(lower):.0f} % below full rank trained by AdamW in perplexity" in said
    tiny = {row.row.name: row for row in results.measured("tiny", "main")[2]}
    gaps = tiny["GaLore, residual"].differences(tiny["full rank"])
    assert f"with three seeds, it ends {-max(gaps):.3f} to {-min(gaps):.3f} nats below full rank" in said
    muon = next(
        row for row in results.measured("tiny", "rivals")[2] if row.row.group == "Muon" and len(row.results) == 3
    ).differences(tiny["full rank"])
    assert f"trained by Muon ends lower still, {-max(muon):.3f} to {-min(muon):.3f} nats below AdamW's" in said
    assert len(gaps) == len(muon) == 3 and statistics.mean(muon) < statistics.mean(gaps)


def island_losses(suite: str) -> dict[str, dict[str, float]]:
    """The first seed's loss of each row with two islands, by kind of run and what its name says of it."""
    found: dict[str, dict[str, float]] = {}
    for row in results.measured("tiny", suite)[2]:
        kind, _, what = row.row.name.replace(", 2 islands", "").partition(", ")
        if row.results[0].get("islands") == 2:
            found.setdefault(kind, {})[what] = row.losses[0]
    return found


def test_what_becomes_of_islands_updates():
    """As docs/results/training.md orders them."""
    found = island_losses("island_choices")
    assert found.keys() == {"full rank", "ReLoRA", "one-sided"}
    for kind, of in found.items():
        losses = {what.removesuffix(", H 200"): loss for what, loss in of.items()}
        first, second, *others = sorted(losses, key=losses.__getitem__)
        assert (first, second) == ("Nesterov 0.5", "average"), kind
        resets = [loss for what, loss in losses.items() if "reset" in what]
        assert min(resets) - losses[second] > 5 * (losses[second] - losses[first]), kind
        cost = losses["Nesterov 0.9"] - losses["Nesterov 0.9, fp32"]
        assert cost < losses["Nesterov 0.9"] - losses["Nesterov 0.5"], kind
    assert IslandsConfig().outer == (0.7, 0.5)
    said = "For each of them Nesterov with the smaller momentum ended lowest, so that it is the default"
    assert said in text_of("docs/results/training.md")


def test_islands_against_data_parallel():
    """As docs/results/training.md tells it."""
    rows = {row.row.name: row for row in results.measured("tiny", "islands")[2]}
    found = {
        kind: {int(what[2:]): loss for what, loss in of.items() if what[2:].isdigit()}
        for kind, of in island_losses("islands").items()
    }
    full, chains = found["full rank"], [found["ReLoRA"], found["one-sided"]]  # in 4 bits and fp32
    assert [full[every] for every in sorted(full)] == sorted(full.values()) and full[50] > rows["full rank"].losses[0]
    for chain in chains:
        assert all(chain[every] > full[every] for every in full)
        assert min(chain, key=chain.__getitem__) not in (min(chain), max(chain))
    two = {name: row.results[0]["bytes_exchanged"] for name, row in rows.items() if ", 2 islands" in name}
    fewest = min(two, key=two.__getitem__)
    assert fewest == "full rank in 2 bits, 2 islands, H 1000"
    assert rows[fewest].losses[0] < min(min(chain.values()) for chain in chains)
    for kind, chain in zip(("ReLoRA", "one-sided"), chains, strict=True):
        in_8_bits = f"{kind} in 8 bits, 2 islands, H 500"
        assert abs(rows[in_8_bits].losses[0] - chain[500]) < 1e-3
        assert 0.5 < two[in_8_bits] / two[f"{kind}, 2 islands, H 500"] < 0.6
        assert two[in_8_bits] < two["full rank, 2 islands, H 500"]
    assert rows["one-sided in 8 bits, r d/16, 2 islands, H 500"].losses[0] > chains[1][500] + 0.1
    for name, row in rows.items():
        if ", 4 islands" in name:
            of_two = rows[name.replace("4 islands", "2 islands")]
            assert min(row.losses) > max(of_two.losses), name
            assert row.results[0]["bytes_exchanged"] == pytest.approx(
                2 * of_two.results[0]["bytes_exchanged"], rel=0.01
            )
    record = report.measurements("benchmarks")["islands_tiny"]["result"]
    steps = {(row["method"], row["way"]): row["step_s"] for row in record["rows"]}
    assert 18 < steps["full", "data parallel"] / steps["full", "islands"] < 22
    islands = {name: row for name, row in rows.items() if row.results[0].get("islands")}
    page = text_of("docs/results/training.md")
    seeds = {name: len(row.losses) for name, row in islands.items()}
    kinds = ("full rank", "ReLoRA", "one-sided")
    several = {f"{kind}, {n} islands, H {every}" for kind in kinds for n in (2, 4) for every in (50, 200, 1000)}
    assert {seeds[name] for name in several} == {3} and seeds["full rank, 2 islands, H 200, steps 12000"] == 2
    assert sum(count > 1 for count in seeds.values()) == len(several) + 1
    assert "Islands in 4 bits or fp32 have three seeds at H 50, 200 and 1000" in page
    shortest = rows["full rank in 2 bits, 2 islands, H 30"]
    of_two = [row.losses[0] for name, row in islands.items() if "2 islands" in name and "steps" not in name]
    assert shortest.losses[0] == min(of_two)


def test_other_methods():
    """As docs/results/training.md and docs/guides/methods.md tell of them."""
    rows = [row for row in results.measured("tiny", "rivals")[2] if row.row.group]
    best = {method: method_quality.measured(method) for method in method_quality.GROUPS}
    best = {method: row for method, row in best.items() if row is not None}
    assert {method: len(row.losses) for method, row in best.items()} == dict.fromkeys(method_quality.GROUPS, 3)
    for row in best.values():
        swept = [other.row.value for other in rows if other.row.group == row.row.group]
        assert swept[0] < row.row.value < swept[-1], "the best learning rate is not known"
    full, page = tiny_runs.row("main", "full rank"), text_of("docs/results/training.md")
    full_spread = statistics.stdev(full.losses)
    gaps = {method: row.differences(full) for method, row in best.items()}
    assert max(gaps["muon"]) < 0 and "with each of three seeds" in page
    assert all(abs(statistics.mean(gaps[method])) < full_spread for method in ("fira", "apollo"))
    assert max(gaps["fira"] + gaps["apollo"]) < min(
        statistics.mean(gaps[method]) for method in ("scale", "apollo_mini")
    )
    relora, random = tiny_runs.row("galore", "ReLoRA, r 16"), tiny_runs.row("islands", "one-sided, r 16")
    for method in ("switchlora", "sst"):
        assert abs(best[method].mean - relora.mean) < statistics.stdev(relora.losses)
        assert max(best[method].differences(random)) < 0
    assert min(best[method].mean for method in ("cola", "crnet")) > max(
        best[method].mean for method in best if method not in ("cola", "crnet")
    )


def test_published_perplexities_are_those_that_the_recipes_quote():
    for method, (own, full, paper) in method_quality.PUBLISHED.items():
        size = "1b" if method == "switchlora" else "130m"
        text = "".join((ROOT / f"relora_ds/recipes/llama_{size}_{one}.yaml").read_text() for one in (method, "full"))
        assert f"{own:.2f}" in text and f"{full:.2f}" in text, method
        assert paper in text or "ReLoRA paper" in text, method


def test_the_costs_of_masks_and_of_merges_without_a_master():
    """As docs/concepts/restart.md tells them."""
    pruned = {ratio: tiny_runs.lead("reset", "ReLoRA", f"magnitude, reset ratio {ratio}") for ratio in (0.99, 0.9)}
    sentence = f"separate masks cost {pruned[0.99]:.2f} nats at a ratio of 0.99 and {pruned[0.9]:.2f} at 0.9"
    assert sentence in text_of("docs/concepts/restart.md")
    series = report.measurements("quantization")["requantization"]["result"]["series"]
    lost = {one["format"]: 100 * one["others"]["lost"][-1] for one in series if one["size"] == 0.1}
    sentence = f"make up 10 % of W, {lost['int8']:.1f} %, {lost['fp8']:.0f} % and {lost['nf4']:.0f} %"
    assert sentence in text_of("docs/concepts/restart.md")


def test_the_cost_of_checkpoints_is_that_of_its_file():
    record = report.measurements("checkpoints")["cost_130m"]["result"]
    rows = checkpoint_cost.markdown(record).splitlines()[4:]
    page = (DOCS / "concepts/checkpoints.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(record["rows"]) and set(rows) <= set(page)


def test_the_broadcast_of_W_belongs_to_the_merge():
    """Not to the agreement, where the ranks compare what they have."""
    source = (ROOT / "relora_ds/zero/restart.py").read_text(encoding="utf-8")
    summary = {line.split()[0]: line for line in source.split('"""')[1].splitlines() if line.startswith("    ")}
    assert "broadcast" in summary["merge"] and "broadcast" not in summary["agree"]
    diagram = (DOCS / "concepts/restart.md").read_text(encoding="utf-8").split("```")[1]
    assert diagram.index("1 merge") < diagram.index("broadcast stored W1") < diagram.index("2 reinit")
    assert "broadcast(" not in (ROOT / "relora_ds/zero/verify_ranks.py").read_text(encoding="utf-8")


def test_the_log_of_kills_is_counted_right():
    outcomes = Counter(
        json.loads(line).get("outcome")
        for line in (DOCS / "results/kills.jsonl").read_text(encoding="utf-8").splitlines()
    )
    ends = outcomes["equal to the untouched run, to the bit"]
    assert set(outcomes) == {None, "killed", "came to its end before", "equal to the untouched run, to the bit"}
    assert f"It holds {outcomes['killed']} kills and {ends} ends, and no end differed." in text_of(
        "docs/guides/faults.md"
    )


def test_the_times_of_object_storage_are_those_of_the_code():
    text = text_of("docs/guides/faults.md")
    assert f"renews an object, `lock`, every {lease.RENEW_S:.0f} seconds" in text
    assert "waits for up to a minute" in text and lease.DEAD_S == 60
    assert f"waited for, at most {uploading.END_S // 60} minutes" in text
    assert f"at most `checkpoint.remote_stop_s` seconds ({CheckpointConfig.remote_stop_s})" in text


def test_extras_are_named_as_they_are_installed():
    """Nothing of that name is on PyPI: `relora_ds[plot]` would install somebody else's."""
    scripts = (path for path in (ROOT / "launch_scripts").iterdir() if path.is_file())
    for path in [*(ROOT / "relora_ds").rglob("*.py"), *PAGES, ROOT / "README.md", *scripts]:
        assert "relora_ds[" not in path.read_text(encoding="utf-8").replace("relora-ds[", "relora_ds["), path


def test_modules_that_never_ask_for_the_stage():
    """docs/concepts/shard_view.md names them; comments and docstrings may speak of it."""
    text = text_of("docs/concepts/shard_view.md")
    (sentence,) = re.findall(r"written against it and never ask for the stage: (.*?)\.(?= |$)", text)
    modules = re.findall(r"`(relora_ds/[\w/]+\.py)`", sentence)
    assert len(modules) > 3
    for module in modules:
        with io.StringIO((ROOT / module).read_text(encoding="utf-8")) as source:
            names = [one.string for one in tokenize.generate_tokens(source.readline) if one.type == tokenize.NAME]
        assert not [name for name in names if "stage" in name], module


@pytest.mark.parametrize("page", ["benchmarks", "quantization"])
def test_each_page_of_measurements_says_which_processor(page):
    """Two machines of one label: only one of them multiplies in 16 bits."""
    units = {"benchmarks": "with AVX-512 BF16", "quantization": "without 16-bit units"}
    text = text_of(f"docs/results/{page}.md")
    assert units.pop(page) in text and units.popitem()[1] not in text


def test_check_needs_the_configuration_of_a_model_and_nothing_else(tmp_path):
    """docs/guides/train.md: a model of the hub has its configuration downloaded."""
    llama(max_position_embeddings=2048).config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    overrides = [f"model.name_or_path={tmp_path}", "model.init=pretrained", "data.source=pydocs", "data.tokenizer=null"]
    recipe = load_recipe("continued", [*overrides, "data.max_tokens=null"], check_files=False)
    config, _ = network_of(recipe)
    assert config.model_type == "llama"
    sentence = "A model of the Hugging Face hub has its configuration downloaded, and nothing else."
    assert sentence in text_of("docs/guides/train.md")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_keys_in_yaml_are_keys_of_a_recipe(page):
    def flat(tree: dict, prefix: str = ""):
        for key, value in tree.items():
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    for block in fenced(page, "yaml"):
        if "output_type:" in block:  # a task file of lm-eval, which tests/training/test_tasks.py uses
            continue
        assert set(flat(yaml.safe_load(block))) <= {*keys.names(), "extends"}


def test_keys_in_text_are_keys_of_a_recipe():
    sections = {key.partition(".")[0] for key in keys.names() if "." in key}
    known = {*keys.names(), *ALIASES}
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        for section, name in re.findall(r"`(\w+)\.(\w+)[=:`]", text):
            assert section not in sections or f"{section}.{name}" in known or name in ("py", "relora_config"), page


def test_every_recipe_that_a_page_speaks_of_is_shipped():
    """Also where a page shortens the name: `_relora_20k` stands for several."""
    for page in [*PAGES, ROOT / "README.md"]:
        for suffix in re.findall(r"`(_\w+)`", page.read_text(encoding="utf-8")):
            if suffix.startswith(("_full", "_control", "_lora", "_relora")):
                assert any(name.endswith(suffix) for name in recipe_names()), (page, suffix)
