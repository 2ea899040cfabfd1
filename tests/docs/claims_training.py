"""Claims of docs/results/training.md, by heading. See `tests/docs/prose.py`."""

import math
from statistics import mean, stdev

from relora_ds.config import load_recipe, method_of
from relora_ds.lowrank.singular_values import RANK_SHARE
from relora_ds.planning.network import network_of, shapes_of
from tests.docs import method_quality
from tests.docs.phrases import WORDS, between, fraction, listed, with_each_seed
from tests.docs.tiny_runs import LORA, RECIPE, lead, leads, loss, paper, rank, row, rows, spread, training_lead
from tests.lab.bench import report
from tests.lab.experiments import link_times

SHARE = f"{100 * RANK_SHARE:.0f} %"
SIZES = ("60M", "130M", "250M", "350M")


def scales() -> list[str]:
    small, large = (load_recipe(f"{name}_full") for name in ("small", "llama_130m"))
    shapes, weights = (shapes_of(method_of(recipe), network_of(recipe)[0]) for recipe in (RECIPE, small))
    linear = sum(shape.numel() for shape in shapes.merged.values())
    rest = row("main", "full rank").results[0]["total_parameters"] - linear
    relora = row("main", "ReLoRA").results[0]
    assert rest > relora["trainable_parameters"] / 2
    return [
        f"`small` ({weights.num_trainable / 1e6:.0f}M parameters, "
        f"{small.total_steps * small.tokens_per_step / 1e6:.0f}M tokens of C4)",
        f"`paper` (130M, {large.total_steps * large.tokens_per_step / 1e9:.1f}B)",
        f"{linear / 1e6:.2f}M parameters in {len(shapes.merged)} linear layers, {rest / 1e6:.2f}M in embeddings",
        f"{relora['step']:,} steps of {RECIPE.tokens_per_step} tokens of WikiText-2, "
        f"so {relora['tokens'] / 1e6:.1f}M tokens",
        f"{RECIPE.warm_start_steps:,} steps are its warm start, {fraction(RECIPE.warm_start_steps / relora['step'])},",
        f"most of the {relora['trainable_parameters'] / 1e6:.2f}M that train here",
        f"singular values above {SHARE} of the largest",
    ]


def equal_tokens() -> list[str]:
    gaps = leads("main", "ReLoRA", LORA)
    twice = lead("horizon", "ReLoRA, steps 16000", f"{LORA}, steps 16000")
    shorter = loss("variants", "ReLoRA, warm start 1000") - loss("main", "Control")
    ahead = [math.log(paper("main", "ReLoRA", size) / paper("main", "full rank", size)) for size in SIZES]
    lost = [size for size in SIZES if paper("main", "ReLoRA", size) > paper("main", "Control", size)]
    first, second = (training_lead("main", "ReLoRA", LORA, after, after + 500) for after in (3000, 3500))
    cycles = [training_lead("main", "ReLoRA", LORA, after, after + 1000) for after in range(3000, 8000, 1000)]
    full, lora, relora = gains_over_frozen()
    return [
        f"LoRA with the same warm start,** {with_each_seed(gaps)}: by {listed(gaps, 4)} nats, "
        f"on average by {mean(gaps):.4f} (standard deviation {stdev(gaps):.4f})",
        f"standard deviation over the seeds is {spread('main', 'ReLoRA'):.3f}",
        f"With twice the steps the gap is {twice:.3f}",
        f"**It ends below the Control by {lead('main', 'ReLoRA', 'Control'):.3f}, "
        f"and below LoRA without a warm start by {lead('main', 'ReLoRA', 'LoRA'):.3f}.**",
        f"With 1,000 steps of it instead of 2,000, the first seed's ReLoRA ends {shorter:.3f} above the Control",
        f"{WORDS[len(lost)]} of {WORDS[len(SIZES)]} sizes loses to its Control ({', '.join(lost)})",
        f"**Full rank stays ahead of ReLoRA** by {lead('main', 'full rank', 'ReLoRA'):.3f} nats",
        f"ReLoRA gains {fraction(relora / full)} and LoRA {fraction(lora / full)}",
        f"at every size: by {listed(ahead, 3)} nats from 60M to 350M",
        f"{WORDS[len(row('main', 'ReLoRA').results[0]['restart_steps']) + 1]} cycles of rank {RECIPE.relora.r} leave "
        f"{rank('main', 'ReLoRA')} singular values above {SHARE} of the largest, LoRA with the same warm start leaves "
        f"{rank('main', LORA)}, full rank {rank('main', 'full rank')} of 64",
        f"make it {rank('rank', 'ReLoRA, restart every 500')} and {rank('rank', 'ReLoRA, restart every 250')}",
        f"is lower by {-first:.3f}, in the next 500 steps ReLoRA's is by {second:.3f}",
        f"ReLoRA's lead is {listed(cycles, 3)}",
    ]


def learning_rates() -> list[str]:
    def losses(name: str, rate: float) -> list[float]:
        return [loss("lr", f"{name}, learning rate {rate}", seed) for seed in range(3)]

    low, high = losses("LoRA", 0.002), losses("LoRA", 0.004)
    assert [a < b for a, b in zip(low, high, strict=True)] == [False, True, True]
    return [
        f"they end at {low[1]:.4f} and {low[2]:.4f} with 2e-3, at {high[1]:.4f} and {high[2]:.4f} with 4e-3",
        f"has 4e-3: {mean(losses('Control', 0.004)):.4f} on average, {mean(losses('Control', 0.002)):.4f} with 2e-3",
    ]


def ablation() -> list[str]:
    all_but_rate = "restarts, reset, jagged, warm start"

    def gain(name: str, over: str) -> str:
        return f"{lead('ablation', name, over):.3f}"

    def perplexity(name: str) -> str:
        return f"{paper('ablation', name):.2f}"

    return [
        f"{perplexity(all_but_rate)} is taken for everything at full rank's learning rate",
        f"nothing:** {perplexity('restarts')} in the paper, after LoRA's {perplexity('LoRA')}",
        f"the fair comparison, and restarts gain {gain('restarts', 'LoRA, random W')}",
        f"from LoRA without W to LoRA with it ({gain('LoRA, random W', 'LoRA')})",
        f"{perplexity('restarts, jagged')} in the paper; here it costs {gain('restarts', 'restarts, jagged')}",
        f"With it and the ramp the paper has {perplexity('restarts, reset, jagged')}; here the loss is "
        f"{gain('restarts, reset, jagged', 'restarts')} below that of restarts alone",
        f"the ramp adds {gain('restarts, reset, jagged', 'restarts, reset')}",
        f"**The warm start brings most:** {perplexity(all_but_rate)} in the paper, "
        f"{gain(all_but_rate, 'restarts, reset, jagged')} here",
        f"Without restarts it brings {gain('warm start', 'LoRA, random W')}, and restarts add "
        f"{gain(all_but_rate, 'warm start')}",
        f"some more:** {perplexity('ReLoRA')} in the paper; here {gain('ReLoRA', all_but_rate)} to ReLoRA, and "
        f"{lead('lr', f'{LORA}, learning rate 0.004', f'{LORA}, learning rate 0.002'):.3f} to LoRA",
    ]


def number_of_steps() -> list[str]:
    start, steps = RECIPE.warm_start_steps, (3500, 5000, 8000, 16000)

    def ahead(name: str, other: str) -> list[float]:
        return [lead("horizon", f"{name}, steps {count}", f"{other}, steps {count}") for count in steps]

    def longest(name: str, warm_start: int, other: str) -> list[float]:
        return leads("horizon", f"{name} in the longest run, warm start {warm_start}", other)

    before, after = (leads("horizon", f"ReLoRA, steps {count}", f"{LORA}, steps {count}") for count in steps[:2])
    assert with_each_seed(before) == with_each_seed(after)
    lora, control, full = ahead("ReLoRA", LORA), ahead("ReLoRA", "Control"), ahead("full rank", "ReLoRA")
    noise = spread("horizon", "ReLoRA, steps 16000")
    won = [gap > 0 for gap in leads("horizon", "ReLoRA, steps 16000", "Control, steps 16000")]
    quarter, over_control = (longest("ReLoRA", start, "Control, steps 16000") for start in (4000, 3000))
    over_lora = longest("ReLoRA", 3000, "LoRA in the longest run, warm start 3000")
    assert with_each_seed(over_control) == with_each_seed(over_lora)
    return [
        f"{steps[0] - start:,} to {steps[1] - start:,} after the phase transition, {with_each_seed(after)}",
        f"With 3,500 steps ReLoRA ends {-lora[0]:.4f} above LoRA with the same warm start, with 5,000 it ends "
        f"{lora[1]:.4f} below, with 8,000 {lora[2]:.4f}, and with 16,000 (almost two epochs) {lora[3]:.4f}",
        f"is {WORDS[round(lora[3] / noise)]} times the spread of the losses, whose standard deviation over seeds is "
        f"{noise:.3f}",
        f"ReLoRA leads by {listed(control, 3)}, and in the longest run the Control is ahead with "
        f"{WORDS[won.count(False)]} of {WORDS[len(won)]} seeds",
        f"{start:,} steps are {100 * start / steps[0]:.0f} % of the shortest run and {100 * start / steps[-1]} % of",
        f"ReLoRA leads the Control by {mean(quarter):.3f} instead of {control[2]:.3f}, {with_each_seed(quarter)}",
        f"Full rank's lead over ReLoRA is {-mean(longest('ReLoRA', 4000, 'full rank, steps 16000')):.3f} instead of "
        f"{full[2]:.3f}, and ReLoRA's over LoRA with the same warm start "
        f"{mean(longest('ReLoRA', 4000, 'LoRA in the longest run, warm start 4000')):.4f} instead of {lora[2]:.4f}",
        f"(standard deviation {spread('horizon', 'ReLoRA in the longest run, warm start 3000'):.3f}): "
        f"{mean(over_control):.3f} over the Control, {mean(over_lora):.4f} over LoRA, both {with_each_seed(over_lora)}",
        f"stays: from {full[0]:.3f} to {listed(full[1:], 3)}",
    ]


def reset() -> list[str]:
    ratios = (0.5, 0.9, 0.99, 0.999)

    def cost(name: str) -> float:
        return lead("reset", "ReLoRA", name)

    def first_step(name: str) -> float:
        return row("reset", name).results[0]["first_updates"]

    long = [first_step(f"magnitude, reset ratio {ratio}") / 1e5 for ratio in ratios]
    half = [f"{mode}, reset ratio 0.5" for mode in ("random", "magnitude_joint")]
    few = ["zero", *(f"{mode}, reset ratio {ratio}" for mode in ("random", "magnitude_joint") for ratio in ratios[1:])]
    usual = {round(first_step(name)) for name in [*half, *few]}
    apart = {ratio: cost(f"magnitude, reset ratio {ratio}") for ratio in ratios}
    assert f"{apart[0.5]:.2f}" == f"{apart[0.9]:.2f}"
    return [
        f"a first step of {between(long, 1, '·10⁵')} learning rates",
        f"With ratios of 0.5 and 0.9 the loss is {apart[0.5]:.2f} above the reference, with the paper's "
        f"{load_recipe('llama_130m_relora').relora.reset_ratio} still {apart[0.99]:.3f}",
        f"{between([loss('reset', name) for name in few], 4)} where a tenth or less is kept",
        f"Keeping half costs {between(map(cost, half), 4)}, keeping all {cost('none'):.4f}",
        f"about {' or '.join(WORDS[one] for one in usual)} learning rates long",
    ]


def precision() -> list[str]:
    for name in ("bf16", "int8"):
        assert lead("precision", name, f"{name}, no master") < 0.00005
    return [
        f"**int8 costs {lead('precision', 'bf16', 'int8'):.4f}, nf4 {lead('precision', 'bf16', 'nf4'):.4f},**",
        f"without them it is {lead('precision', 'nf4', 'nf4, no master'):.4f} worse, after "
        f"{WORDS[row('precision', 'nf4').results[0]['restarts']]} restarts",
        f"fp32 is {lead('precision', 'bf16', 'fp32'):.4f} above bf16",
    ]


def rank_and_interval() -> list[str]:
    gains = {r: lead("rank", f"ReLoRA, r {r}", f"{LORA}, r {r}") for r in (1, 2, 4, 8, 16, 32)}
    every = {steps: loss("rank", f"ReLoRA, restart every {steps}") for steps in (125, 250, 500, 1000, 2000, 4000)}
    middle = [every[steps] for steps in (250, 500, 1000)]
    return [
        f"by {listed([gains[r] for r in (1, 2, 4, 8)], 4)} with r of 1, 2, 4 and 8. With 16, "
        f"{fraction(16 / 64)} of the width, they cost {-gains[16]:.4f}, and with 32 they cost {-gains[32]:.4f}",
        f"between 250 and 1,000 steps** ({between(middle, 4)})",
        f"125 is too short ({every[125]:.4f}); 2,000 and 4,000 are too long ({every[2000]:.4f}, {every[4000]:.4f})",
        f"500 is better than the recipe's {RECIPE.relora.restart_every:,} by {every[1000] - every[500]:.4f}",
    ]


def gains_over_frozen() -> tuple[float, ...]:
    """What full rank, LoRA and ReLoRA gain over a frozen W after the same warm start, with one seed."""
    return tuple(loss("variants", "W frozen") - loss("main", name) for name in ("full rank", LORA, "ReLoRA"))


def variants() -> list[str]:
    full, lora, relora = gains_over_frozen()
    other_ways = ("A from the gradient", "moments carried over the transition", "ReLoRA, ramp 1", "ReLoRA, ramp 10")
    by_warm_start = [
        lead("variants", f"ReLoRA, warm start {steps}", f"{LORA}, warm start {steps}")
        for steps in (250, 500, 1000, 2000, 4000)
    ]
    assert abs(by_warm_start[4]) < 0.00005
    short, longer = ([loss("variants", f"ReLoRA, warm start {n}", seed) for seed in range(3)] for n in (250, 500))
    better = [one < other for one, other in zip(short, longer, strict=True)]
    slow_ramp = -lead("variants", "ReLoRA, ramp 200", "ReLoRA")
    alpha = {value: -lead("variants", f"ReLoRA, lora_alpha {value}", "ReLoRA") for value in (2, 8, 16)}
    return [
        f"**Of what full rank gains over a frozen W, {full:.3f}, LoRA gains {fraction(lora / full)}** ({lora:.3f}) "
        f"**and ReLoRA {fraction(relora / full)}** ({relora:.3f})",
        f"by more than {max(abs(lead('variants', name, 'ReLoRA')) for name in other_ways):.4f}:",
        f"{fraction(200 / RECIPE.relora.restart_every)} of every cycle, costs {slow_ramp:.4f}",
        "{:.4f} with 250 of 8,000 steps, {:.4f} with 500, {:.4f} with 1,000, {:.4f} with 2,000, none with 4,000".format(
            *by_warm_start
        ),
        f"{WORDS[better.count(True)].capitalize()} of {WORDS[len(better)]} seeds are better with 250 steps than with "
        f"500 ({listed(short, 4)} instead of {listed(longer, 4)})",
        f"{alpha[8]:.4f} are lost with 8, {alpha[16]:.4f} with 16, and {alpha[2]:.4f} with 2",
    ]


def other_methods() -> list[str]:
    def over(method: str, suite: str, name: str) -> float:
        best = method_quality.measured(method)
        assert best is not None and len(best.losses) == 3, method
        return mean(best.differences(row(suite, name)))

    full = {method: over(method, "main", "full rank") for method in method_quality.GROUPS}
    relora = {method: over(method, "galore", "ReLoRA, r 16") for method in ("switchlora", "sst")}
    residual = over("muon", "galore", "exact, carried, residual, r 16")
    return [
        f"with each of three seeds, {-full['muon']:.3f} on average",
        f"come nearest, and end {-residual:.3f} above it on average",
        f"close to full rank with AdamW,** {full['fira']:+.4f} and {full['apollo']:+.4f} on average",
        f"end {full['scale']:.3f} and {full['apollo_mini']:.3f} above it on average",
        f"after a warm start, {relora['switchlora']:+.4f} and {relora['sst']:+.4f} on average",
        f"end {full['cola']:.3f} and {full['crnet']:.3f} above full rank on average",
    ]


def one_sided() -> list[str]:
    def above(name: str, other: str) -> float:
        return -lead("galore", name, other)

    residual = {r: leads("galore", f"exact, carried, residual, r {r}", "full rank") for r in (4, 8, 16)}
    won = [gap > 0 for gaps in residual.values() for gap in gaps]
    sent = {name: sent_a_step(f"exact, carried, {name}") for name in ("residual, r 4", "r 16")}
    assert sent["residual, r 4"] < sent["r 16"]
    random = "random, rotated, restart every 200"
    over_exact, over_sketch = (
        leads("galore", random, f"{name}, carried, restart every 200") for name in ("exact", "warm sketch")
    )
    moments = [
        [mean_loss(f"exact, {name}, restart every {every}") for name in ("rotated", "carried", "zeroed")]
        for every in (50, 200, 500)
    ]
    assert all(rotated < carried < zeroed for rotated, carried, zeroed in moments)
    with_random = {r: leads("galore", f"random, rotated, residual, r {r}", "full rank") for r in (4, 8, 16)}
    losses = {lr: mean_loss(f"exact, carried, learning rate {lr}") for lr in ("0.004", "0.008", "0.016")}
    assert losses["0.008"] < losses["0.016"] < losses["0.004"]
    best = "exact, carried, learning rate 0.008"
    return [
        f"With r 16, {fraction(16 / 64)} of the width, it ends "
        f"{above('exact, carried, r 16', 'full rank'):.3f} above it",
        f"and {above('exact, carried, r 16', 'ReLoRA, r 16'):.3f} above ReLoRA of the same rank",
        f"At its best learning rate, 0.008, it ends {above(best, 'full rank'):.3f} above full rank",
        f"ends {above('exact, carried, warm start, r 16', 'ReLoRA, r 16'):.3f} above ReLoRA with r 16, and "
        f"{above('exact, carried, warm start, r 4', 'ReLoRA, r 4'):.3f} above it with r 4",
        f"{listed(map(mean, residual.values()), 3)} below it with r of 4, 8 and 16, with {WORDS[won.count(True)]} of "
        f"{WORDS[len(won)]} runs below full rank of the same seed",
        f"with r 4 and the residual every 20 steps a step sends {sent['residual, r 4'] / 1e3:.0f}k numbers on average, "
        f"GaLore with r 16 sends {sent['r 16'] / 1e3:.0f}k, and ends "
        f"{above('exact, carried, r 16', 'exact, carried, residual, r 4'):.3f} higher",
        f"At 200 steps between restarts it ends {mean(over_exact):.3f} below GaLore with a basis from the exact "
        f"gradient, {with_each_seed(over_exact)}, and {mean(over_sketch):.3f} below one with a basis from a warm "
        "sketch",
        f"by {listed((mean(residual[r]) - mean(with_random[r]) for r in residual), 3)} with r of 4, 8 and 16",
        f"with exact bases, rotated ones end {listed((b - a for a, b, _ in moments), 3)} below carried ones, and "
        f"zeroed ones {listed((c - b for _, b, c in moments), 3)} above them, with 50, 200 and 500 steps between "
        "restarts",
    ]


def mean_loss(name: str) -> float:
    """Mean over the seeds of a one-sided chain's validation loss."""
    return mean(loss("galore", name, seed) for seed in range(3))


def sent_a_step(name: str) -> float:
    """Numbers that a step reduces, and what a residual update reduces and broadcasts, over its steps."""
    of = row("galore", name).row
    recipe = load_recipe(of.recipe, of.overrides)
    shapes = shapes_of(method_of(recipe), network_of(recipe)[0])
    weights, every = sum(shape.numel() for shape in shapes.merged.values()), recipe.relora.residual_every
    return shapes.num_trainable + (2 * weights / every if every else 0)


def islands() -> list[str]:
    """How much faster islands reach a loss of data parallel over a slow link, with every seed."""
    found = rows("islands")
    record = report.measurements("benchmarks")["islands_tiny"]["result"]
    seconds = link_times.by_row([*found.values()], record, "100mbit/50ms")

    def fastest_to(parallel: str) -> tuple[str, str]:
        reached = [name for name in seconds if "islands" in name and min(leads("islands", name, parallel)) >= 0]
        assert not any("ReLoRA" in name or "one-sided" in name for name in reached), "low-rank chains reach neither"
        first = min(reached, key=seconds.__getitem__)
        return first, f"{seconds[parallel] / seconds[first]:.3g} times as fast"

    to_full, to_relora = fastest_to("full rank"), fastest_to("ReLoRA, r 16")
    assert (to_full[0], to_relora[0]) == ("full rank, 2 islands, H 200, steps 12000", "full rank, 2 islands, H 50")
    return [
        f"reach the loss of data-parallel full rank {to_full[1]}** (H 200, 12,000 steps)",
        f"that of data-parallel ReLoRA {to_relora[1]}** (H 50)",
    ]


CLAIMS = {
    "Training results": scales,
    "Equal tokens": equal_tokens,
    "Learning rates": learning_rates,
    "Ablation": ablation,
    "Number of steps": number_of_steps,
    "Reset of the moments": reset,
    "Precision": precision,
    "Rank and interval": rank_and_interval,
    "Variants of the restart": variants,
    "One-sided chains": one_sided,
    "Other methods": other_methods,
    "Islands against data parallel": islands,
}
# heading -> a part of a sentence -> why no file of results has its numbers
FROM_ELSEWHERE = {
    "Equal tokens": {"networks of 11M to 66M finds ReLoRA behind as well (arXiv 2509.12960)": "another paper"},
    "Earlier networks": {
        "In the first network each restart cost 0.003 to 0.008 nats": "the runs' files were not kept",
        "(3.6804 and 3.6807, on a part of the validation split)": "the runs' files were not kept",
        "ReLoRA leads by 0.004 after 5,000 and 0.009 after 7,500": "the runs' files were not kept",
    },
}
