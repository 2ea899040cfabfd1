"""What a run has learned and sent, in sentences. Every number is from the run's own files."""

import numpy as np

from relora_ds.lab.figures.run_history import RunRecord, value_at
from relora_ds.utils.text import human_bytes, human_count


def sentences(run: RunRecord) -> list[str]:
    """Return the lines, the first with the name of the run; what its files do not tell is left out."""
    return [line for line in (_state(run), *_losses(run), _trained(run), _sample(run)) if line]


def _state(run: RunRecord) -> str:
    train = run.train
    state = "" if run.state == "unknown" else f", {run.state}"
    reason = f": {run.reason}" if run.reason else ""
    steps = "1 step" if train["step"][-1] == 1 else f"{train['step'][-1]:,.0f} steps"
    return f"{run.name}: {run.method}, {steps}, {human_count(train['tokens'][-1])} tokens{state}{reason}"


def _losses(run: RunRecord) -> list[str]:
    lines = [f"The training loss {_change(run.train['loss'], run.train['step'])}."]
    steps, losses, bits = (run.evaluations[column] for column in ("step", "val_loss", "bits_per_byte"))
    if len(steps):
        line = f"The validation loss {_change(losses, steps)}. The perplexity {_change(np.exp(losses))}"
        lines.append(line + (f", that is {bits[-1]:.3f} bits per byte." if np.isfinite(bits[-1]) else "."))
    return lines


def _change(values: np.ndarray, steps: np.ndarray | None = None) -> str:
    """Return the first and the last value, and the steps that they are of."""
    first, last = (f"{values[i]:.2f}" + ("" if steps is None else f" at step {steps[i]:,.0f}") for i in (0, -1))
    return f"is {last}" if len(values) == 1 else f"went from {first} to {last}"


def _trained(run: RunRecord) -> str:
    """Return which share trained, and was sent, in the run's last phase."""
    if not run.total:
        return ""
    began = run.transitions[-1] if run.transitions else 0
    share = _percent(run.trainable / run.total)
    line = f"{human_count(run.trainable)} of {human_count(run.total)} parameters ({share}) trained"
    line += f" after step {began:,}." if began else "."
    sent, full = (
        float(run.train[column][-1] - value_at(run.train, column, began))
        for column in ("total_bytes_wire", "full_rank_bytes_wire")
    )
    if run.has_traffic and full > 0:
        part = f"{_percent(sent / full)} of the {human_bytes(full)} that full rank would have sent"
        line += f" In these steps each rank sent {human_bytes(sent)}, {part}."
    return line


def _sample(run: RunRecord) -> str:
    if not run.samples:
        return ""
    prompt, text = (" ".join("".join(c if c.isprintable() else " " for c in part).split()) for part in run.samples[0])
    return f'It continues "{prompt}" with "{text}".'


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
