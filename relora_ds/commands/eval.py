"""`python -m relora_ds eval`."""

import argparse
import json
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
        required=True,
        nargs="+",
        metavar=("TEXT", "section.key=value"),
        help="text, JSON lines or parquet files (all of their text); a corpus such as wikitext2 or "
        "pydocs, a recipe, or a run directory (their validation split). What follows overrides "
        "its recipe, such as data.text_column=body",
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help=f"tokens of context (default: the recipe's; of {DEFAULT_RECIPE} where there is none)",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (default: 8)")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="to compute in")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a model whose code is not transformers'")


def run(arguments: argparse.Namespace) -> int:
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.data import tokenizer
    from relora_ds.data.rows import Masking
    from relora_ds.interop.sources import model_of, tokenizer_of
    from relora_ds.lowrank.formats import DTYPES
    from relora_ds.training.validation import evaluate
    from relora_ds.zero.accelerator import device_of_rank

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size: {arguments.batch_size} is not 1 or more")
    given = tokenizer.load(tokenizer_of(arguments.model, "DIR_OR_ID"), arguments.trust_remote_code)
    text, seq_len = _text(arguments.data[0], arguments.data[1:], given, arguments.trust_remote_code)
    seq_len = seq_len if arguments.seq_len is None else arguments.seq_len
    model = model_of(arguments.model, arguments.trust_remote_code, "DIR_OR_ID")
    _check(model.config, seq_len, tokenizer.num_ids(given))
    if isinstance(text.layout, Masking):
        _mask_documents(model.config)
    model.to(device_of_rank(), DTYPES[arguments.dtype])  # type: ignore[arg-type]  # a decorator hides self
    result = evaluate(model, text, seq_len=seq_len, micro_batch_size=arguments.batch_size, device=model.device)
    if arguments.json:
        print(json.dumps({**result.figures(), "seq_len": seq_len, "dtype": arguments.dtype}))
        return 0
    print(f"{arguments.model} on {arguments.data[0]}, {arguments.dtype}, {seq_len} tokens of context")
    for label, figure in (
        ("tokens predicted", f"{result.val_tokens:,}"),
        ("loss, nats per token", f"{result.val_loss:.6f}"),
        ("perplexity per token", f"{result.ppl:.4f}"),
        ("perplexity per word", f"{result.word_ppl:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.6f}"),
        *([] if result.galore_loss is None else [("loss as GaLore's code", f"{result.galore_loss:.6f}")]),
    ):
        print(f"  {label:<22}{figure:>14}")
    return 0


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


def _check(config, seq_len: int, num_ids: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if seq_len < 2 or (positions is not None and seq_len > positions):
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
