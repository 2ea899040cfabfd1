"""What the runs of a suite say together: a table, and what the figures are drawn from."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from relora_ds.checkpoint.store import directories
from relora_ds.lab.bench.environment import remark_on_seeds, rows_as_markdown
from relora_ds.lab.experiments import update_spectra
from relora_ds.lab.experiments.link_bytes import link_bytes
from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suites import Row, Suite
from relora_ds.utils.text import human_bytes, human_count

_FINGERPRINT = "data_fingerprint"


@dataclass(frozen=True)
class Measured:
    """A row and what its finished runs found, by seed."""

    row: Row
    results: list[dict]

    @property
    def losses(self) -> list[float]:
        return [one["val_loss"] for one in self.results]

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses)

    def differences(self, other: "Measured") -> list[float]:
        """Return validation loss less `other`'s, seed by seed, of the seeds that both have."""
        theirs = {one["seed"]: one["val_loss"] for one in other.results}
        return [one["val_loss"] - theirs[one["seed"]] for one in self.results if one["seed"] in theirs]


def measured(suite: Suite, runs: Sequence[Run], results: Results) -> list[Measured]:
    """Return the suite's rows in order, as far as there are results."""
    found = []
    for row in suite.rows:
        kept = [result for run in runs if run.row is row and (result := results.read(run))]
        if kept:
            found.append(Measured(row, kept))
    return found


def best_of(rows: Sequence[Measured]) -> Measured:
    """Return the row with the lowest loss, over the seeds that all of them have."""
    seeds = set.intersection(*({one["seed"] for one in row.results} for row in rows))
    return min(rows, key=lambda row: sum(one["val_loss"] for one in row.results if one["seed"] in seeds))


def write(
    suite: Suite, runs: Sequence[Run], results: Results, directory_of: Callable[[Run], Path], with_figures: bool
) -> list[Path]:
    """Write the suite's table and figures into the directory of the results; return the files.

    Args:
        directory_of: where a run is, or was. Spectra are drawn of the first seed's runs that are still there.
    """
    rows = measured(suite, runs, results)
    results.directory.mkdir(parents=True, exist_ok=True)
    page, told = results.directory / f"{suite.name}.md", blocks(suite, rows, len(runs))
    page.write_text(markdown(suite, told) + "\n", encoding="utf-8")
    if not with_figures:
        return [page]
    from relora_ds.lab.figures.plot_experiments import save_suite

    there = {
        run.row.name: directory_of(run)
        for run in runs
        if run.seed == 0 and (results.read(run) or {}).get("spectrum") and directories(directory_of(run))
    }
    return [
        page,
        *save_suite(
            suite.name,
            suite.title,
            told,
            curves(rows),
            suite.reference,
            sweeps(rows),
            links(rows),
            _spectra(there) if suite.spectra and there else None,
            results.directory,
        ),
    ]


def _spectra(there: dict[str, Path]) -> dict:
    found = update_spectra.measure(list(there.values()))
    for one, name in zip(found["runs"], there, strict=True):
        one["name"] = name
    return found


def markdown(suite: Suite, told: list[str | list[list[str]]]) -> str:
    """Return the suite's title and `blocks`."""
    shown = (block if isinstance(block, str) else rows_as_markdown(block) for block in told)
    return "\n\n".join([f"### {suite.title}", *shown])


def blocks(suite: Suite, rows: list[Measured], num_runs: int) -> list[str | list[list[str]]]:
    """Paragraphs and tables (rows of cells, the first their head): what was asked and found, and on what."""
    done = sum(len(row.results) for row in rows)
    reference = next((row for row in rows if row.row.name == suite.reference), None)
    told: list = [suite.text]
    if done < num_runs:
        told.append(f"{done} of {num_runs} runs have ended.")
    if rows:
        groups = dict.fromkeys(row.row.axis for row in rows)
        islands = _numbers_of_islands(rows)
        told += [_table([row for row in rows if row.row.axis == axis], reference, islands) for axis in groups]
        told += [*remarks_on_texts(rows), *_best(rows), _made(rows)]
    return told


def _table(rows: list[Measured], reference: Measured | None, islands: Sequence[int]) -> list[list[str]]:
    """islands: the numbers of them that the suite's runs have, which data parallel is compared with."""
    papers = list(dict.fromkeys(size for row in rows for size in row.row.paper or {}))
    columns: dict[str, Callable[[Measured], str]] = {
        "row": lambda row: row.row.name,
        "seeds": lambda row: str(len(row.results)),
        "validation loss": lambda row: spread(row.losses),
        "perplexity": lambda row: f"{statistics.mean(one['ppl'] for one in row.results):.2f}",
        "loss against the reference": lambda row: against(row, reference),
        "at the transition": lambda row: _mean(row, "loss_at_switch", "{:.3f}"),
        "restarts": lambda row: str(row.results[0]["restarts"]),
        "first updates": lambda row: _mean(row, "first_updates", "{:.3g}", max),
        "rank of the update": lambda row: _rank(row),
        "trainable": lambda row: human_count(row.results[0]["trainable_parameters"]),
        "all": lambda row: human_count(row.results[0]["total_parameters"]),
        "tokens": lambda row: human_count(row.results[0]["tokens"]),
        "sent per rank": lambda row: human_bytes(row.results[0]["bytes_wire"]) if row.results[0]["bytes_wire"] else "",
        "over its link": lambda row: " / ".join(map(human_bytes, link_bytes(row.results[0], islands))),
        "hours": lambda row: f"{sum(one['seconds'] for one in row.results) / len(row.results) / 3600:.2f}",
        **{f"paper, {size}": partial(_of_paper, size) for size in papers},
    }
    table = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    shown = [i for i in range(len(columns)) if any(line[i] for line in table[1:])]
    return [[line[i] for i in shown] for line in table]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def against(row: Measured, reference: Measured | None) -> str:
    """Loss less the reference's, seed by seed: the mean, the least and the most."""
    if reference is None:
        return ""
    if row is reference:
        return "reference"
    differences = row.differences(reference)
    if len(differences) < 2:
        return f"{differences[0]:+.4f}" if differences else ""
    return f"{statistics.mean(differences):+.4f} ({min(differences):+.4f} to {max(differences):+.4f})"


def _mean(row: Measured, key: str, form: str, of=statistics.mean) -> str:
    values = [one[key] for one in row.results if one.get(key) is not None]
    return form.format(of(values)) if values else ""


def _rank(row: Measured) -> str:
    found = [one["spectrum"]["numerical_rank"] for one in row.results if one.get("spectrum")]
    if not found:
        return ""
    r = row.results[0]["r"]
    return f"{statistics.median(found):g}" + (f" (r {r})" if r else "")


def _of_paper(size: str, row: Measured) -> str:
    return _printed((row.row.paper or {}).get(size))


def _printed(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _best(rows: list[Measured]) -> list[str]:
    """Return each group's best value in every sweep at equal tokens."""
    told = []
    for axis in dict.fromkeys(row.row.axis for row in rows if row.row.axis):
        if len({row.results[0]["tokens"] for row in rows if row.row.axis == axis}) > 1:
            continue
        found = []
        for group in dict.fromkeys(row.row.group for row in rows if row.row.axis == axis):
            swept = [row for row in rows if row.row.axis == axis and row.row.group == group]
            if len(swept) == 1:
                continue
            best = best_of(swept)
            at_edge = best.row.value in (swept[0].row.value, swept[-1].row.value)
            found.append(
                f"{group} {best.row.value:g} ({best.mean:.4f}" + (", the edge of what was tried)" if at_edge else ")")
            )
        if found:
            told.append(f"The best {axis}: {'; '.join(found)}.")
    return told


def _made(rows: list[Measured]) -> str:
    """Device and versions, each with its commits; hours in all, a run that rows share counted once."""
    runs = {one["name"]: one for row in rows for one in row.results}.values()
    made: dict[str, dict[str, None]] = {}
    for one in runs:
        conditions = dict(one["conditions"])
        commit = conditions.pop("commit", None)
        commits = made.setdefault(", ".join(f"{key} {value}" for key, value in conditions.items()), {})
        if commit is not None:
            commits[_short(commit)] = None
    told = [
        ", ".join([conditions, *(["commit " + " ".join(commits)] if commits else [])])
        for conditions, commits in made.items()
    ]
    hours = sum(one["seconds"] for one in runs) / 3600
    return " ".join([f"{'; '.join(told)}. {hours:.1f} hours of training.", *remarks_on_seeds(rows)])


def _short(commit: str) -> str:
    """Return the first digits of a commit, and whether the tree had changes."""
    digits, _, dirty = commit.partition("-")
    return digits[:10] + (f"-{dirty}" if dirty else "")


def remarks_on_texts(rows: list[Measured]) -> list[str]:
    """Return what is to be said where results are not of the same token ids, so that their losses do not compare.

    Earlier results have no fingerprint of them; the number of validation tokens tells most texts apart.
    """
    texts: dict[tuple[int, str], dict[str, None]] = {}
    known = {one["val_tokens"]: one[_FINGERPRINT] for row in rows for one in row.results if _FINGERPRINT in one}
    for row in rows:
        for one in row.results:
            fingerprint = one.get(_FINGERPRINT) or known.get(one["val_tokens"], "")
            texts.setdefault((one["val_tokens"], fingerprint[:10]), {})[row.row.name] = None
    if len(texts) < 2:
        return []
    told = (
        f"{', '.join(names)}: {tokens:,} validation tokens" + (f", fingerprint {fingerprint}" if fingerprint else "")
        for (tokens, fingerprint), names in texts.items()
    )
    return [f"Not all have the same text or tokenizer, and losses on different ones do not compare. {'; '.join(told)}."]


def remarks_on_seeds(rows: list[Measured]) -> list[str]:
    """Return what is to be said of all results of `rows`, once."""
    remarks = (remark_on_seeds(one["conditions"]) for row in rows for one in row.results)
    return list(dict.fromkeys(remark for remark in remarks if remark is not None))


def curves(rows: list[Measured]) -> dict[str, list[dict]]:
    """Return the training and validation curves of finished runs by row, without sweeps."""
    return {
        row.row.name: [{key: one[key] for key in ("seed", "train_curve", "curve")} for one in row.results]
        for row in rows
        if not row.row.axis
    }


def sweeps(rows: list[Measured]) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """Return `{axis: {group: [(value, losses by seed)]}}`."""
    found: dict[str, dict[str, list]] = {}
    for row in rows:
        if row.row.axis and row.row.group:
            found.setdefault(row.row.axis, {}).setdefault(row.row.group, []).append((row.row.value, row.losses))
    return found


def links(rows: list[Measured]) -> dict[str, list[tuple[float, list[float]]]]:
    """Return `{kind of run: [(bytes over a link, losses by seed)]}` of a suite with islands; of others nothing."""
    counts = _numbers_of_islands(rows)
    found: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        name, is_island = row.row.group or row.row.name, row.results[0].get("islands")
        names = [name] if is_island else [f"{name}, {count} ranks" for count in counts]
        for kind, sent in zip(names, link_bytes(row.results[0], counts), strict=True):
            found.setdefault(kind, []).append((sent, row.losses))
    return found if counts else {}


def _numbers_of_islands(rows: list[Measured]) -> list[int]:
    return sorted({count for row in rows if (count := row.results[0].get("islands"))})
