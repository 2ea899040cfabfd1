"""HTML pages with everything in them: no script, nothing loaded from elsewhere, light and dark."""

import base64
from html import escape

import numpy as np

from relora_ds.lab.figures.run_history import RunRecord
from relora_ds.utils.text import human_bytes, human_count

CAPTIONS = {
    "loss": "Loss in nats per token; the lines are smoothed. The fall of the first steps is cut off.",
    "learning_rate": "Learning rate. After a restart it climbs from 0.",
    "throughput": "Training tokens per second over all ranks, evaluations and checkpoints not counted.",
    "traffic": "Bytes that each rank has sent in collectives (ring), and what full-rank training would have sent.",
    "comparison": "Loss over what it cost.",
}
STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #24292f; --soft: #57606a; --line: #d0d7de }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181d; --ink: #d7dde4; --soft: #9aa4af; --line: #3a434d }
}
body { margin: 2rem auto; max-width: 66rem; padding: 0 1rem; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93em }
th, td { padding: .35rem .6rem; text-align: right; vertical-align: bottom; white-space: nowrap }
th { font-weight: 600; color: var(--soft); white-space: normal }
td { border-top: 1px solid var(--line) }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left }
.suite th:nth-child(n+2), .suite td:nth-child(n+2) { text-align: right }
td.said { border: 0; padding-top: 0; color: var(--soft); white-space: normal }
figure { margin: 1.5rem 0 } img { width: 100%; height: auto; display: block }
figcaption { color: var(--soft); font-size: .9em }
blockquote { margin: .4rem 0 1rem; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap }
blockquote span { color: var(--soft) }
"""


def html_page(runs: list[RunRecord], light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    """Return the page. `light` and `dark`: PNG files by figure name, one of each for either colour scheme."""
    title = escape(", ".join(run.name for run in runs))
    columns = [
        "run",
        "method",
        "state",
        "step",
        "tokens",
        "validation loss",
        "perplexity",
        "restarts",
        "trainable / all parameters",
        "sent by each rank",
        "full rank would send",
    ]
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = ""
    for run in runs:
        rows += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _row(run)) + "</tr>"
        if text := _sentence(run):
            rows += f'<tr><td class="said" colspan="{len(columns)}">{escape(text)}</td></tr>'
    figures = "".join(_figure(CAPTIONS[name], light[name], dark[name]) for name in light)
    samples = "".join(
        f"<p><b>{escape(run.name)}</b></p>"
        + "".join(
            f"<blockquote><span>{escape(prompt)}</span>{escape(text)}</blockquote>" for prompt, text in run.samples
        )
        for run in runs
        if run.samples
    )
    if samples:
        samples = f"<h2>What the networks write after the grey words</h2>{samples}"
    return _page(
        title,
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n'
        f"{figures}\n{samples}",
    )


def suite_page(title: str, blocks: list[str | list[list[str]]], figures: list[tuple[str, bytes, bytes]]) -> str:
    """Return a suite's page: paragraphs and tables (a list of rows, the first its head) in order, then the figures.

    Args:
        figures: caption, and the PNG file for the light and for the dark colour scheme.
    """
    told = "\n".join(f"<p>{escape(block)}</p>" if isinstance(block, str) else _table(block) for block in blocks)
    return _page(escape(title), told + "\n" + "".join(_figure(*one) for one in figures))


def _page(title: str, body: str) -> str:
    """`title` is escaped already."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}</body></html>\n"
    )


def _table(rows: list[list[str]]) -> str:
    head, *body = (
        "".join(f"<{cell}>{escape(text)}</{cell}>" for text in row)
        for row, cell in zip(rows, ["th", *["td"] * len(rows)], strict=False)
    )
    lines = "".join(f"<tr>{line}</tr>" for line in body)
    return f'<div class="wide"><table class="suite"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _row(run: RunRecord) -> list[str]:
    train, last = run.train, run.evaluations["val_loss"][-1:]
    loss = float(last[0]) if len(last) else np.nan
    share = f"{human_count(run.trainable)} / {human_count(run.total)}" if run.total else "–"
    sent = [human_bytes(train[c][-1]) if run.has_traffic else "–" for c in ("total_bytes_wire", "full_rank_bytes_wire")]
    return [
        run.name,
        run.method,
        run.state,
        f"{train['step'][-1]:.0f}",
        human_count(train["tokens"][-1]),
        f"{loss:.4f}" if np.isfinite(loss) else "–",
        f"{np.exp(loss):.2f}" if np.isfinite(loss) else "–",
        str(len(run.restarts)),
        share,
        *sent,
    ]


def _sentence(run: RunRecord) -> str:
    """Return what the run says of itself: its verdict, or why it ended without one."""
    if run.state in ("done", "unknown"):
        return run.verdict
    return f"{run.state}: {run.reason}" if run.reason else ""


def _figure(caption: str, light: bytes, dark: bytes) -> str:
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
        f'<img src="{_inline(light)}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
