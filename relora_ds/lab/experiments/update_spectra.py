"""What rank the updates of runs add up to: the singular values of `W_after - W_before`, layer by layer.

arXiv 2307.05695, Figures 3 and 4: from the end of the warm start to the end of training, ReLoRA's updates have spectra
like those of full-rank training, while LoRA's have r singular values and nothing beside them. One process on the CPU
reads one matrix of a checkpoint at a time.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import Tensor, nn

from relora_ds.checkpoint import store
from relora_ds.checkpoint.manifest import tag_of
from relora_ds.checkpoint.model import Contents, OpenModel, contents_of, is_checkpoint, open_model
from relora_ds.config import method_of
from relora_ds.interop.sources import find_checkpoint
from relora_ds.lab.figures.run_history import method_text, recipe_in
from relora_ds.lowrank.singular_values import RANK_SHARE, SMALL, Spectrum, spectrum_of
from relora_ds.models.build import meta_model
from relora_ds.models.loading import load_config
from relora_ds.utils.files import short_names

OLDEST = "from the oldest checkpoint that is kept"
WITH_INITIAL_VALUE = "all of s·B·A, with its initial value"


@dataclass(frozen=True)
class Window:
    """From which checkpoint to which one an update is measured.

    Attributes:
        after: at its end.
        contents: of `after`.
        before: at its beginning; None where the low-rank phase changed no W, and `s·B·A` of `after` is all it added.
        note: what a reader of the figures should know about this choice, or "".
    """

    after: Path
    contents: Contents
    before: Path | None
    note: str = ""

    @property
    def start(self) -> int:
        """The step at its beginning."""
        return contents_of(self.before).step if self.before else self.contents.step - self.contents.t


def measure(sources: Sequence[Path], before: str | None = None, trust_remote_code: bool = False) -> dict:
    """Singular values of the updates of runs, by kind of layer.

    Args:
        sources: runs (their newest checkpoint), or checkpoints.
        before: where the updates begin: a step of each run, or the path of a run or checkpoint of the same network.
            Default: see `window_of`.
        trust_remote_code: whether code that comes with a checkpoint's model may run.

    Returns:
        JSON values: `share` and `small`, the limits of `numerical_rank` and `num_below`; `runs`, each with `name`,
        `source`, `method`, `r` (None at full rank), `restarts`, `start` and `stop` (steps), `before`, `after`, `note`,
        `numerical_rank` (median over all matrices), and `kinds`: by the last component of the layers' names
        `num_matrices`, `max_rank`, `is_exact`, the medians `numerical_rank`, `stable_rank` and `effective_rank`,
        `num_values` and how many of them are below `small` (`num_below`), and the `singular_values` of each matrix.
        None is what the largest singular values of a large matrix do not tell.

    Raises:
        ValueError: a source has no checkpoint, or none to compare with; or the two are of different networks.
    """
    paths = list(dict.fromkeys(source.expanduser().resolve() for source in sources))
    windows = [window_of(path, before) for path in paths]
    wrapped = {name for window in windows for name in window.contents.layers}
    layers = [linear_layers(window, wrapped, trust_remote_code) for window in windows]
    for window, names in zip(windows, layers, strict=True):
        if not names:
            raise ValueError(
                f"{window.after}: its network has no linear layer beside its head (method cola trains two factors in "
                "place of each weight), so it has no updates to measure; leave it out"
            )
        _require_same_shapes(window, names)
    return {
        "share": RANK_SHARE,
        "small": SMALL,
        "runs": [
            {"name": name, "source": str(path), **_measured(window, names)}
            for name, path, window, names in zip(short_names(paths), paths, windows, layers, strict=True)
        ],
    }


def window_of(source: Path, before: str | None = None) -> Window:
    """Return which update of a run is measured.

    By default it begins at the end of the warm start. Where that checkpoint is not kept: of a run that changed no W it
    is all of `s·B·A`, of another one it begins at the oldest checkpoint. Arguments and errors: see `measure`.
    """
    after = find_checkpoint(source)
    contents = contents_of(after)
    if before is not None:
        return Window(after, contents, _named(before, after))
    kept = store.directories(after.parent)
    earlier = [path for path in kept[: kept.index(after)] if is_checkpoint(path)] if after in kept else []
    transition = _end_of_warm_start(after)
    if (begun := after.with_name(tag_of(transition))) in earlier:
        return Window(after, contents, begun)
    has_base = all(layer["base"] for layer in contents.layers.values())
    if contents.layers and contents.has_first_base and (has_base or not earlier):
        return Window(after, contents, None, "" if has_base else WITH_INITIAL_VALUE)
    if earlier:
        return Window(after, contents, earlier[0], OLDEST)
    raise ValueError(
        f"{after}: no earlier checkpoint of its run is kept, so what training added is unknown; train "
        f"with checkpoint.every={transition or 'STEPS'} checkpoint.keep_every={transition or 'STEPS'}, or name a "
        "checkpoint of the same network with --before STEP_OR_PATH"
    )


def linear_layers(window: Window, wrapped: set[str], trust_remote_code: bool = False) -> list[str]:
    """Return the layers whose updates are measured, in model order.

    Args:
        wrapped: the low-rank layers of all runs that are compared. A full-rank run is measured at the same ones; where
            it has none of them, at all of its matrices but embeddings and head.
    """
    if window.before is None:
        return [name for name in window.contents.layers if name in window.contents.matrices]
    return [name for name in window.contents.matrices if name in wrapped] or _all_linears(window, trust_remote_code)


def _named(before: str, after: Path) -> Path:
    """Return the checkpoint that `--before` means for the one at the end."""
    if before.isdecimal():
        found = after.with_name(tag_of(int(before)))
        if not is_checkpoint(found):
            there = ", ".join(path.name for path in store.directories(after.parent)) or "none"
            raise ValueError(
                f"--before: {before}, but {after.parent} has no {found.name}; there are {there}; "
                "checkpoint.keep_every keeps those at its multiples"
            )
    else:
        found = find_checkpoint(Path(before).expanduser().resolve())
    if found == after:
        raise ValueError(f"--before: {before} is the checkpoint that the update ends with; name an earlier one")
    return found


def _end_of_warm_start(after: Path) -> int:
    """Return the step at which the low-rank phase took over; 0 where there was no warm start."""
    recipe = recipe_in(after.parent.parent)
    return method_of(recipe).warm_start_steps if recipe is not None else 0


def _all_linears(window: Window, trust_remote_code: bool) -> list[str]:
    if not (window.after / "config.json").is_file():
        raise ValueError(
            f"{window.after}: which of its weights are linear layers is unknown: it has no low-rank "
            "layers, and is no transformers model (no config.json); compare it with a low-rank run"
        )
    model = meta_model(load_config(window.after, trust_remote_code))
    head = model.get_output_embeddings()
    others = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding) or module is head}
    return [name for name in window.contents.matrices if name not in others]


def _require_same_shapes(window: Window, layers: list[str]) -> None:
    if window.before is None:
        return
    before, after = contents_of(window.before).matrices, window.contents.matrices
    for layer in layers:
        if before.get(layer) != after[layer]:
            there = tuple(before[layer]) if layer in before else "missing"
            raise ValueError(
                f"--before: {window.before} is of another network than {window.after}: {layer} is {there} "
                f"there and {tuple(after[layer])} here; name a checkpoint of the same network"
            )


def _measured(window: Window, layers: list[str]) -> dict:
    contents = window.contents
    spectra: dict[str, list[Spectrum]] = {}
    with open_model(window.after) as after, open_model(window.before) if window.before else nullcontext() as before:
        for layer in layers:
            try:
                found = spectrum_of(_update(before, after, layer))
            except ValueError as error:
                raise ValueError(f"{window.after}: {layer}: {error}") from error
            spectra.setdefault(layer.rpartition(".")[2], []).append(found)
    return {
        "method": method_text(window.after.parent.parent),
        "r": contents.relora["r"] if contents.relora else None,
        "restarts": len(contents.restarts),
        "start": window.start,
        "stop": contents.step,
        "before": window.before and str(window.before),
        "after": str(window.after),
        "note": window.note,
        "numerical_rank": median(one.numerical_rank() for several in spectra.values() for one in several),
        "kinds": {kind: _summary(several) for kind, several in spectra.items()},
    }


def _update(before: OpenModel | None, after: OpenModel, layer: str) -> Tensor:
    """`[out, in]`, fp32."""
    return after.update(layer) if before is None else after.merged(layer).sub_(before.merged(layer))


def _summary(spectra: list[Spectrum]) -> dict:
    """Summarize the matrices of one kind."""
    effective = [one.effective_rank for one in spectra if one.effective_rank is not None]
    below = [one.count_below() for one in spectra]
    return {
        "num_matrices": len(spectra),
        "max_rank": max(one.num_all for one in spectra),
        "is_exact": all(one.is_exact for one in spectra),
        "numerical_rank": median(one.numerical_rank() for one in spectra),
        "stable_rank": _rounded(median(one.stable_rank for one in spectra)),
        "effective_rank": _rounded(median(effective)) if len(effective) == len(spectra) else None,
        "num_values": sum(one.num_all for one in spectra),
        "num_below": None if None in below else sum(filter(None, below)),
        "singular_values": [[_rounded(value) for value in one.singular_values.tolist()] for one in spectra],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
