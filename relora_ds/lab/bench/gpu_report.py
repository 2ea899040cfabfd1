"""What `bench gpu-check` found, as tables: of one check, and one line for each card."""

import statistics

from relora_ds.lab.bench import layer
from relora_ds.lab.bench.baselines import FULL
from relora_ds.lab.bench.environment import rows_as_markdown

OURS = "ours, dense"
OUT_OF_MEMORY = "out of memory"  # a result, and no fault
SPEEDS = ("speed at 350M", "several GPUs", "speed at 1.3B")


def markdown(result: dict) -> str:
    """Everything that was found, and what was not."""
    blocks = [_machine(result)]
    speeds = [(part, entry) for part in SPEEDS for entry in _found(result, part) if "tokens_per_s" in entry]
    if speeds:
        blocks.append(rows_as_markdown(_speed_rows(speeds)))
    pauses = [entry for part in ("restart", "several GPUs") for entry in _found(result, part) if "pauses_s" in entry]
    if pauses:
        blocks.append(rows_as_markdown(_restart_rows(pauses)))
    blocks += [layer.markdown(entry["result"]) for entry in _found(result, "layer") if "result" in entry]
    for title, lines in (("Failed:", suspicious(result)), ("Not measured:", _skipped(result))):
        if lines:
            blocks.append("\n".join([title, "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(blocks)


def suspicious(result: dict) -> list[str]:
    """Return the tests that failed and what could not be measured; running out of memory is a result."""
    failed = [
        f"{label(part, entry)}: {entry['error'].splitlines()[-1]}"
        for part in result["parts"]
        for entry in _found(result, part)
        if entry.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY
    ]
    if "error" in result["machine"]:
        failed.insert(0, f"machine: {result['machine']['error']}")
    return failed


def label(part: str, entry: dict) -> str:
    """Return the label of an entry: a variant occurs in a part with several networks or ZeRO stages."""
    setting = f" ({entry['preset']}, ZeRO-{entry['stage']})" if "stage" in entry else ""
    return f"{part}: {entry['name'].removeprefix(f'{part}: ')}{setting}"


def cards(records: dict[str, dict]) -> str:
    """One line for each check: `records` by name, as they are in the files."""
    if not records:
        return "No card was checked yet."
    rows = [
        [
            "card",
            "GPUs",
            "tests passed",
            "failed",
            *(f"{name} at {size}" for size in ("350M", "1.3B") for name in ("full rank", "ours", "of full rank")),
        ]
    ]
    for record in records.values():
        result = record["result"]
        rows.append(
            [
                record["conditions"]["device"],
                str(result["machine"].get("gpus", "")),
                *(str(_tests(result, outcome)) for outcome in ("passed", "failed")),
                *_speeds_of(result, "speed at 350M"),
                *_speeds_of(result, "speed at 1.3B"),
            ]
        )
    return rows_as_markdown(rows)


def _found(result: dict, part: str) -> list[dict]:
    return result["parts"].get(part, [])


def _skipped(result: dict) -> list[str]:
    left_out = [
        f"{label(part, entry)}: {entry.get('skipped', OUT_OF_MEMORY)}"
        for part in result["parts"]
        if part != "correctness"
        for entry in _found(result, part)
        if "skipped" in entry or entry.get("error") == OUT_OF_MEMORY
    ]
    tests = [
        f"correctness: {entry['name']}: {entry['skipped']}"
        for entry in _found(result, "correctness")
        if "skipped" in entry
    ]
    few = tests if len(tests) < 5 else [f"correctness: {len(tests)} tests: {tests[0].rpartition(': ')[2]}, …"]
    return [*few, *left_out, *(f"{what}: {name} is not installed" for name, what in result["missing"].items())]


def _tests(result: dict, outcome: str) -> int:
    return sum(entry.get("outcome") == outcome for entry in _found(result, "correctness"))


def _machine(result: dict) -> str:
    machine = result["machine"]
    made = machine.get("conditions", {})
    size = f", {machine['memory_bytes'] / 1e9:.0f} GB, CUDA {machine['cuda']}" if "memory_bytes" in machine else ""
    reached = f" A large product in bf16: {machine['measured_flops'] / 1e12:,.1f} TFLOP/s." if made else ""
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "deepspeed", "transformers") if name in made)
    tests = ", ".join(f"{_tests(result, outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return f"{made.get('device', 'unknown')} x {machine.get('gpus', 0)}{size}; {versions}.{reached}\n\nTests: {tests}."


def _speed_rows(entries: list[tuple[str, dict]]) -> list[list[str]]:
    rows = [["variant", "network", "ZeRO", "GPUs", "micro-batch", "tokens/s", "of full rank", "MFU", "peak memory"]]
    for _, entry in entries:
        base = next(
            (
                full["tokens_per_s"]
                for _, full in entries
                if full["name"] == FULL and all(full[key] == entry[key] for key in ("preset", "stage", "world_size"))
            ),
            None,
        )
        rows.append(
            [
                entry["name"],
                entry["preset"],
                str(entry["stage"]),
                str(entry["world_size"]),
                str(entry["micro_batch_size"]),
                f"{entry['tokens_per_s']:,.0f}",
                _ratio(entry["tokens_per_s"], base),
                _percent(entry["mfu"]),
                f"{entry['peak_bytes'] / 1e9:.2f} GB" if entry["peak_bytes"] else "",
            ]
        )
    return rows


def _restart_rows(entries: list[dict]) -> list[list[str]]:
    rows = [["restart", "network", "ZeRO", "GPUs", "pause", "without the drift", "one step", "pause / step"]]
    for entry in entries:
        pause, own = (statistics.median(entry[key]) for key in ("pauses_s", "without_drift_s"))
        rows.append(
            [
                entry["name"].removeprefix("restart: "),
                entry["preset"],
                str(entry["stage"]),
                str(entry["world_size"]),
                f"{pause:.3f} s",
                f"{own:.3f} s",
                f"{entry['step_s']:.3f} s",
                f"{pause / entry['step_s']:.2f}",
            ]
        )
    return rows


def _speeds_of(result: dict, part: str) -> list[str]:
    """Tokens per second of full rank and of ours, and their quotient."""
    found = {entry["name"]: entry for entry in _found(result, part) if "tokens_per_s" in entry}
    said = [f"{found[name]['tokens_per_s']:,.0f}{_mfu(found[name])}" if name in found else "" for name in (FULL, OURS)]
    both = FULL in found and OURS in found
    return [*said, _ratio(found[OURS]["tokens_per_s"], found[FULL]["tokens_per_s"]) if both else ""]


def _mfu(entry: dict) -> str:
    return f" ({_percent(entry['mfu'])})" if entry["mfu"] else ""


def _ratio(value: float, base: float | None) -> str:
    return f"{value / base:.2f}x" if base else ""


def _percent(value: float | None) -> str:
    return f"{100 * value:.0f} %" if value is not None else ""
