"""`load_run`: what a training left behind, from Python."""

import functools
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from relora_ds.checkpoint import store
from relora_ds.checkpoint.model import contents_of
from relora_ds.checkpoint.run_files import read_json, read_metrics
from relora_ds.config import Recipe, load_recipe
from relora_ds.data import tokenizer
from relora_ds.interop.sources import find_checkpoint, locate, model_of, tokenizer_of

TRAINER_STATE = "trainer_state.json"  # the Hugging Face Trainer's, in each of its checkpoints


def load_run(path: str | Path, checkpoint: str | None = None, *, trust_remote_code: bool = False) -> "Run":
    """Open a run, a checkpoint or an exported model. Nothing is loaded yet.

    Args:
        path: a run directory of the trainer, one of its checkpoints or its export; a directory that
            `engine.save_checkpoint` wrote into; a checkpoint of the Hugging Face Trainer, or what `save_model` wrote;
            a PEFT export of relora_ds.
        checkpoint: the name of one of several, such as "step_00005000"; None = the exported model where there is
            one, else the newest checkpoint.
        trust_remote_code: whether code that comes with a model may run.

    Returns:
        A `Run`. `.merged()` and `.tokenizer()` load the transformers objects, on the CPU. `.recipe`, `.metrics`,
        `.summary` and `.status` read the files of a run directory; `.step` is the step of the weights.

    Raises:
        ValueError: there is none of them at `path`, or no such checkpoint.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"load_run: {path} is not a directory; give a run, a checkpoint, or a model that relora_ds exported"
        )
    if checkpoint is not None:
        return Run(directory, "checkpoint", find_checkpoint(directory, checkpoint, "checkpoint"), trust_remote_code)
    kind, source = locate(str(directory), "load_run")
    return Run(directory, kind, Path(source), trust_remote_code)


class Run:
    """What a training left behind; `load_run` makes one.

    Attributes:
        path: the directory that was asked for.
        kind: "checkpoint", "huggingface" (an exported model) or "peft".
        source: where the weights are read from.
    """

    def __init__(self, path: Path, kind: str, source: Path, trust_remote_code: bool = False):
        self.path, self.kind, self.source = path, kind, source
        self._trust_remote_code = trust_remote_code

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.kind} {str(self.source)!r})"

    def merged(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return the plain transformers model on the CPU, the low-rank updates merged into it.

        Raises:
            ValueError: the files are damaged, or of a model that is not one of transformers.
        """
        model = model_of(str(self.source), self._trust_remote_code, "load_run")
        nn.Module.to(model, dtype)  # transformers' own has no types
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer that was trained with, or None where none was saved.

        Raises:
            ValueError: its files cannot be loaded.
        """
        places = (Path(tokenizer_of(str(self.source), "load_run")), self.path, *self._run_directories("export"))
        for place in places:
            if (place / "tokenizer_config.json").is_file():
                try:
                    return tokenizer.load(place, self._trust_remote_code)
                except ValueError as error:
                    raise ValueError(str(error).replace("data.tokenizer:", "tokenizer:", 1)) from error
        return None

    @functools.cached_property
    def recipe(self) -> Recipe | None:
        """The recipe of the trainer's run; None of anything else. ValueError where it cannot be read."""
        for directory in self._run_directories():
            return load_recipe(directory / "recipe.yaml", check_files=False)
        return None

    @property
    def metrics(self) -> list[dict]:
        """The lines of the run's metrics.jsonl, or the `log_history` of the Hugging Face Trainer; else []."""
        for directory in self._run_directories():
            return read_metrics(directory)
        return read_json(self.path / TRAINER_STATE).get("log_history", [])

    @property
    def summary(self) -> dict:
        """The contents of the run's summary.json; {} where there is none (yet)."""
        return self._read("summary.json")

    @property
    def status(self) -> dict:
        """The contents of the run's status.json; {} where there is none."""
        return self._read("status.json")

    @property
    def step(self) -> int | None:
        """The applied steps behind these weights; None where the files do not say."""
        if self.kind == "checkpoint":
            return contents_of(self.source).step
        return self.summary.get("step", self.status.get("step"))

    def _read(self, name: str) -> dict:
        for directory in self._run_directories():
            return read_json(directory / name)
        return {}

    def _run_directories(self, *below: str) -> list[Path]:
        """Return the trainer's run directory that this is, or is in, with `below` appended; [] where it is in none."""
        candidates = (self.path, self.path.resolve().parent, self.path.resolve().parent.parent)
        found = [directory for directory in candidates if store.has_run(directory)]
        return [directory.joinpath(*below) for directory in found[:1]]
