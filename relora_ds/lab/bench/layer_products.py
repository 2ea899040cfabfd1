"""One low-rank layer with both products, where both factors train and where B alone does (`bench layer`).

both, B               what trains
separate, folded      `relora.product`
"""

import statistics

from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lowrank import folding

COMPARED: dict[str, dict] = {  # name -> options of ReLoRALinear
    f"{trains}, {product}": {"one_sided": trains == "B", "product": product}
    for trains in ("both", "B")
    for product in ("separate", "folded")
}


def figures(times: dict[str, list[float]], hidden: int, r: int, rows: int) -> dict:
    """Return, by what trains, `gains`: the median of separate / folded time, and `folds`: whether `auto` folds here.

    And `ceilings`: full rank's FLOPs / those of each layer.
    """
    ceilings, gains, folds = {}, {}, {}
    for trains in ("both", "B"):
        how = {"trains_A": trains == "both"}
        for product in ("separate", "folded"):
            flops = folding.flops(hidden, hidden, r, rows, folded=product == "folded", **how)
            ceilings[f"{trains}, {product}"] = 6 * hidden**2 * rows / flops
        pairs = zip(times[f"{trains}, separate"], times[f"{trains}, folded"], strict=True)
        gains[trains] = statistics.median(separate / folded for separate, folded in pairs)
        folds[trains] = rows >= folding.folds_from(hidden, hidden, **how)
    return {"ceilings": ceilings, "gains": gains, "folds": folds}


def markdown(entries: list[dict]) -> str:
    """Return the table of one precision. Speeds are over full rank, with their ceilings in parentheses."""
    first = entries[0]
    gains = ("separate / folded, both", "separate / folded, B")
    table = [["hidden", "r", "full rank, ms", "naive", "PEFT", *COMPARED, *gains]]
    for entry in entries:
        speed = entry["over_full"]
        table.append(
            [
                str(entry["hidden"]),
                str(entry["r"]),
                f"{entry['ms']['full']:.2f}",
                *(f"{speed[name]:.2f}" for name in ("naive", "peft")),
                *(f"{speed[name]:.2f} ({entry['ceilings'][name]:.2f})" for name in COMPARED),
                *(f"{gain:.2f}{'' if entry['folds'][trains] else ' *'}" for trains, gain in entry["gains"].items()),
            ]
        )
    blocks = [
        f"Speed over full rank, in parentheses what the FLOPs allow; {first['precision']}, {first['rows']} tokens:",
        rows_as_markdown(table),
    ]
    left_out = [entry for entry in entries if not all(entry["folds"].values())]
    kept = [gain for entry in entries for trains, gain in entry["gains"].items() if entry["folds"][trains]]
    if left_out:
        blocks.append("\\* `auto` does not fold so few tokens.")
    if kept:
        blocks.append(f"Where `auto` folds, lowest separate / folded time: {min(kept):.2f}.")
    return "\n\n".join(blocks)
