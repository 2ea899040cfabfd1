"""`python -m relora_ds eval`."""

import argparse
import json
import sys
from pathlib import Path

DEFAULT_RECIPE = "quickstart"  # for a text that comes without a recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="DIR_OR_ID",
        help="a Hugging Face causal language model (directory or hub id), a run, a checkpoint, or a "
        "PEFT export of relora_ds; it is evaluated with its own tokenizer",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar=("TEXT", "section.key=value"),
        help="text, JSON lines or parquet files (all of their text); a corpus such as wikitext2 or "
        "pydocs, a recipe, or a run directory (their validation split). What follows overrides "
        "its recipe, such as data.text_column=body",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-eval, by name or by the path of a task file (.yaml). The scores of a finished run are added "
        "to its summary.json, unless --seq-len gives them another context",
    )
    parser.add_argument("--task-files", metavar="DIR", help="task files, whose names --tasks may use")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help=f"tokens of context (default: the recipe's; where there is none, of {DEFAULT_RECIPE} for --data and the "
        "model's own for --tasks)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (default: 8)")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="to compute in")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a model whose code is not transformers'")


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size: {arguments.batch_size} is not 1 or more")
    if not (arguments.data or arguments.tasks):
        raise ValueError("--data and --tasks: neither is given; give a text, tasks of lm-eval, or both")
    if arguments.task_files and not arguments.tasks:
        raise ValueError(f"--task-files: {arguments.task_files} without --tasks; name those to evaluate")
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.data import tokenizer
    from relora_ds.data.rows import Masking
    from relora_ds.interop.sources import model_of, tokenizer_of
    from relora_ds.lowrank.formats import DTYPES
    from relora_ds.zero.accelerator import device_of_rank

    trust = arguments.trust_remote_code
    given = tokenizer.load(tokenizer_of(arguments.model, "DIR_OR_ID"), trust)
    tasks, data = _TaskList(arguments) if arguments.tasks else None, None
    if arguments.data:
        text, seq_len = _text(arguments.data[0], arguments.data[1:], given, trust)
        data = text, seq_len if arguments.seq_len is None else arguments.seq_len
    model = model_of(arguments.model, trust, "DIR_OR_ID")
    for seq_len in (None if data is None else data[1], None if tasks is None else tasks.seq_len):
        _check(model.config, seq_len, tokenizer.num_ids(given))
    if data is not None and isinstance(data[0].layout, Masking):
        _mask_documents(model.config)
    model.to(device_of_rank(), DTYPES[arguments.dtype])  # type: ignore[arg-type]  # a decorator hides self
    figures = {} if data is None else _on_text(arguments, model, *data)
    if tasks is not None:
        figures |= {"tasks": tasks.evaluate(model, given)}
    if arguments.json:
        print(json.dumps({**figures, "dtype": arguments.dtype}))
    return 0


def _on_text(arguments: argparse.Namespace, model, text, seq_len: int) -> dict:
    """Evaluate on a text, print a table unless JSON is asked for, and return the figures."""
    from relora_ds.training.validation import evaluate

    result = evaluate(model, text, seq_len=seq_len, micro_batch_size=arguments.batch_size, device=model.device)
    if not arguments.json:
        print(f"{arguments.model} on {arguments.data[0]}, {arguments.dtype}, {seq_len} tokens of context")
        for label, figure in (
            ("tokens predicted", f"{result.val_tokens:,}"),
            ("loss, nats per token", f"{result.val_loss:.6f}"),
            *((f"  of {name}", f"{loss:.6f}") for name, loss in result.sets.items()),
            ("perplexity per token", f"{result.ppl:.4f}"),
            ("perplexity per word", f"{result.word_ppl:.4f}"),
            ("bits per byte", f"{result.bits_per_byte:.6f}"),
            *([] if result.galore_loss is None else [("loss as GaLore's code", f"{result.galore_loss:.6f}")]),
        ):
            print(f"  {label:<22}{figure:>14}")
    return {**result.figures(), "seq_len": seq_len}


class _TaskList:
    """The tasks of a command line, loaded before the model is.

    Attributes:
        seq_len: tokens of context; None = what the model's configuration allows.
    """

    def __init__(self, arguments: argparse.Namespace):
        from relora_ds.interop import lm_tasks

        self._arguments, self._run = arguments, _run_of(Path(arguments.model).expanduser())
        of_recipe = None
        if self._run is not None:
            from relora_ds.config import read_recipe

            of_recipe = read_recipe(self._run / "recipe.yaml", check_files=False)[0].data.seq_len
        self.seq_len = of_recipe if arguments.seq_len is None else arguments.seq_len
        self._has_other_context = self.seq_len != of_recipe
        # As in a validation: the last token of a sequence is predicted, and predicts nothing.
        self._max_length = None if self.seq_len is None else self.seq_len - 1
        self._tasks = lm_tasks.load(
            arguments.tasks, arguments.task_files, self._max_length, field="--tasks", folder_field="--task-files"
        )

    def evaluate(self, model, tokenizer) -> dict:
        """Evaluate, add the scores to the summary of a finished run, and print a table unless JSON is asked for."""
        from relora_ds.interop import lm_scores

        arguments = self._arguments
        found = lm_scores.scores(
            model.eval(),
            tokenizer,
            self._tasks,
            batch_size=arguments.batch_size,
            max_length=self._max_length,
            of_run=self._run is not None,
            show_progress=sys.stderr.isatty(),
        )
        if not arguments.json:
            context = "" if self.seq_len is None else f", {self.seq_len} tokens of context"
            print(f"{arguments.model} on tasks of lm-eval, {arguments.dtype}{context}")
            for task, metric, value, error in lm_scores.rows_of(found):
                print(f"  {task:<30}{metric:<20}{value:>12}{f' ± {error}' if error else ''}")
        if self._run is not None and self._run == Path(arguments.model).expanduser():
            if self._has_other_context:  # other scores of a run are with its own
                print(
                    f"note: the scores are not added to summary.json: --seq-len {self.seq_len} is not the run's",
                    file=sys.stderr,
                )
            else:
                self._record(found)
        return found

    def _record(self, scores: dict) -> None:
        from relora_ds.training.results import add_scores

        assert self._run is not None, "only a run has a summary"
        try:
            add_scores(self._run, scores)
        except (ValueError, OSError) as error:
            print(f"warning: the scores are not in summary.json: {error}", file=sys.stderr)


def _run_of(path: Path) -> Path | None:
    """Return the run at a path, or the one that a checkpoint at the path is of; None where there is none."""
    run = path.absolute().parent.parent if path.absolute().parent.name == "checkpoints" else path
    return run if (run / "recipe.yaml").is_file() else None


def _text(source: str, overrides: list[str], given, trust_remote_code: bool):
    """Return `(the text in the ids of a tokenizer, the sequence length that belongs to it)`."""
    from relora_ds.config import load_recipe, recipe_names
    from relora_ds.config.data_config import DATA_SOURCES
    from relora_ds.data.eval_corpus import files_in, validation_of

    path = Path(source).expanduser()
    recipe: Path | str
    if (path / "recipe.yaml").is_file():
        recipe = path / "recipe.yaml"
    elif source in recipe_names() or path.suffix in (".yaml", ".yml"):
        recipe = source
    else:
        recipe = DEFAULT_RECIPE
        is_hub_id = source.count("/") == 1 and not path.suffix
        if (source in DATA_SOURCES or is_hub_id) and not path.exists():
            overrides = [f"data.source={source}", *overrides]
        else:
            text = ["data.source=text", f"data.path={source}"]
            data = load_recipe(recipe, [*text, *overrides], check_files=False).data
            return files_in(source, data, given), data.seq_len
    data = load_recipe(recipe, overrides, check_files=False).data
    return validation_of(data, given, trust_remote_code), data.seq_len


def _check(config, seq_len: int | None, num_ids: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if seq_len is not None and (seq_len < 2 or (positions is not None and seq_len > positions)):
        raise ValueError(f"--seq-len: {seq_len} is not between 2 and the model's {positions} positions")
    if num_ids > config.vocab_size:
        raise ValueError(
            f"DIR_OR_ID: its tokenizer has ids up to {num_ids - 1}, its embedding {config.vocab_size} "
            "rows; the tokenizer is of another model"
        )


def _mask_documents(config) -> None:
    """Have a model keep documents apart. ValueError where it cannot."""
    from relora_ds.methods.proof import prove

    found = prove(config, None, attention=config._attn_implementation, next_token=False, documents=True).problems
    if found:
        raise ValueError(found[0])
    config.use_cache = config.get_text_config(decoder=True).use_cache = False  # transformers makes no masks with one
