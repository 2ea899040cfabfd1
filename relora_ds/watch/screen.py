"""What `relora watch` shows: a table of runs, their losses, and what has happened lately."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from relora_ds.utils.text import human_bytes
from relora_ds.watch.chart import chart, is_available
from relora_ds.watch.followed_run import FollowedRun
from relora_ds.watch.progress import Progress, duration, progress_of

_STYLES = {"running": "green", "done": "bold green", "failed": "bold red", "dead": "bold red", "silent": "yellow"}
NUM_EVENTS = 8


def screen(runs: Sequence[FollowedRun], width: int, height: int, now: float | None = None) -> RenderableType:
    """Return all of it, for a terminal of so many columns and lines. now: see `progress_of`."""
    found = [progress_of(run, now) for run in runs]
    parts: list[RenderableType] = [_table(runs, found, width)]
    parts += [
        Text(f"{run.name}: {p.why}", style=_STYLES.get(p.state, ""))
        for run, p in zip(runs, found, strict=True)
        if p.why
    ]
    events = [Text(event) for event in _events(runs)]
    room = height - len(runs) - len(parts) - len(events) - 9
    drawn = chart(runs, width - 4, max(6, room))
    if drawn:
        parts.append(Panel(Text.from_ansi("\n".join(drawn)), title="loss", title_align="left"))
    elif not is_available():
        parts.append(Text("the chart of the losses needs uniplot: pip install '.[watch]'", style="dim"))
    return Group(*parts, *events)


def _table(runs: Sequence[FollowedRun], found: Sequence[Progress], width: int) -> Table:
    columns = {name: [cell(p) for p in found] for name, cell in _COLUMNS.items()}
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    names = min(max(len(run.name) for run in runs), width // 3)
    for name in _FIRST_TO_GO:
        if names + sum(2 + max(map(len, [name, *cells])) for name, cells in columns.items()) > width:
            columns.pop(name, None)
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for i, (run, p) in enumerate(zip(runs, found, strict=True)):
        cells = (
            Text(cells[i], style=_STYLES.get(p.state, "") if name == "state" else "") for name, cells in columns.items()
        )
        table.add_row(run.name, *cells)
    return table


def _events(runs: Sequence[FollowedRun]) -> Iterator[str]:
    """Yield the newest evaluations, restarts, checkpoints, exchanges and spikes, newest last."""
    told = []
    for run in runs:
        prefix = "" if len(runs) == 1 else f"{run.name}: "
        for kind, text in _TEXTS.items():
            told += [
                (line.get("time", 0.0), f"{prefix}step {line['step']:,}  {text(line)}")
                for line in run.lines[kind][-NUM_EVENTS:]
            ]
    yield from (text for _, text in sorted(told, key=itemgetter(0))[-NUM_EVENTS:])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _step(p: Progress) -> str:
    if not p.total_steps:
        return f"{p.step:,}"
    return f"{p.step:,} of {p.total_steps:,}, {100 * p.step / p.total_steps:.0f} %"


def _sent(p: Progress) -> str:
    if not p.sent:
        return ""
    return human_bytes(p.sent) + (f" ({p.full_rank / p.sent:.2f}x less)" if p.full_rank > p.sent else "")


def _seconds(line: dict, key: str) -> str:
    return "" if line.get(key) is None else f", {line[key]:.1f} s"


_COLUMNS = {
    "state": lambda p: p.state,
    "step": _step,
    "left": lambda p: "" if p.left_s is None else duration(p.left_s),
    "loss": lambda p: _number(p.loss),
    "validation": lambda p: _number(p.val_loss),
    "tokens/s": lambda p: "" if p.tokens_per_s is None else f"{p.tokens_per_s:,.0f}",
    "restarts": lambda p: f"{p.restarts or ''}",
    "sent": _sent,
    "last line": lambda p: "" if p.silent_s is None else f"{duration(p.silent_s)} ago",
}
_FIRST_TO_GO = ("last line", "restarts", "sent", "tokens/s", "loss")  # where a terminal is narrow
_TEXTS = {
    "eval": lambda line: f"validation loss {_number(line.get('val_loss'))}",
    "restart": lambda line: f"restart{_seconds(line, 'restart_s')}",
    "checkpoint": lambda line: f"checkpoint of {human_bytes(line.get('bytes') or 0)}{_seconds(line, 'write_s')}",
    "sync": lambda line: (
        f"exchange {line.get('round')} of {len(line.get('islands') or [])} islands{_seconds(line, 'sync_s')}"
        + (f", without {', '.join(map(str, line['missing']))}" if line.get("missing") else "")
    ),
    "spike": lambda line: f"loss spike: {_number(line.get('loss'))}",
    "phase": lambda line: f"phase {line.get('phase')} begins",
}
