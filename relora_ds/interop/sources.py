"""Where weights come from: a run, one of its checkpoints, a Hugging Face model, or a PEFT export of ours.

`init_from`, `python -m relora_ds export` and `python -m relora_ds eval` all name a model in these ways.
"""

import logging
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from relora_ds.checkpoint import manifest, store
from relora_ds.checkpoint.earlier import refusal
from relora_ds.checkpoint.manifest import LATEST
from relora_ds.checkpoint.model import CheckpointWeights, is_checkpoint
from relora_ds.checkpoint.run_files import read_json
from relora_ds.config.remote_code import UntrustedCode
from relora_ds.interop import peft
from relora_ds.models.build import meta_model
from relora_ds.models.loading import load_config, load_model
from relora_ds.models.pretrained_weights import pretrained_weights
from relora_ds.models.stored_head import tied_as_stored
from relora_ds.models.without_values import build_without_values, fill
from relora_ds.zero.plain_model import export_config
from relora_ds.zero.weights import WeightSource, problems

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # beside the checkpoints of a run


def is_finished(run_dir: Path) -> bool:
    """Return True if a run directory has its exported model, and not that of an attempt that is being repeated."""
    if not (run_dir / "export" / "config.json").is_file():
        return False
    return read_json(run_dir / "status.json").get("state", "done") == "done"


def find_checkpoint(source: Path, name: str | None = None, field: str = "--checkpoint") -> Path:
    """Return the directory of one step, in a run, a directory of checkpoints, or `source` itself.

    Args:
        field: what the caller calls `name`, for messages.
        name: such as `step_00005000`; None for the one that `latest` names or, where that file is missing or damaged
            or leads elsewhere, the newest one.

    Raises:
        ValueError: there is none.
    """
    if is_checkpoint(source):
        if name is not None:
            raise ValueError(f"{field}: {name} with {source}, which is a checkpoint itself; give one of the two")
        return source
    is_run = store.has_run(source)
    directory = source / "checkpoints" if is_run else source
    pointed = store.named_by(directory / LATEST)
    if name is None and pointed is not None and is_checkpoint(pointed):
        return pointed
    oldest_first = store.tagged(directory)
    if name is None and oldest_first:
        return oldest_first[-1]
    there = sorted(path.name for path in oldest_first)
    if name in there:
        return directory / name
    if name is not None:
        raise ValueError(f"{field}: {name} is not in {directory}; there are {', '.join(there) or 'none'}")
    if is_run:
        raise ValueError(
            f"{source}: the run has no checkpoint (it did not reach its first one); resume it with "
            "resume=auto, and set checkpoint.every for earlier ones"
        )
    if reason := refusal(source):
        raise ValueError(reason)
    raise ValueError(
        f"{source}: neither a run of relora_ds nor a checkpoint; name a directory with recipe.yaml, or "
        "that of one step, such as RUN/checkpoints/step_00005000"
    )


def locate(source: str, field: str = "source") -> tuple[str, str]:
    """`(kind, path)` of a model's weights; kind: "checkpoint", "peft" or "huggingface" (a directory or a hub id).

    Args:
        field: what names the source, for error messages.

    Raises:
        ValueError: a path at which there is none of them.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise ValueError(
                f"{field}: {source} is no directory; give a run, a checkpoint, a Hugging Face model, or a "
                "PEFT export of relora_ds"
            )
        return "huggingface", source
    if (path / peft.ADAPTER_CONFIG).is_file():
        return "peft", str(path)
    if store.has_run(path) and is_finished(path):
        return "huggingface", str(path / "export")
    if store.has_run(path) or is_checkpoint(path) or (path / LATEST).is_file():
        return "checkpoint", str(find_checkpoint(path))
    if reason := refusal(path):
        raise ValueError(f"{field}: {reason}")
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{field}: {source} is neither a run, a checkpoint, a Hugging Face model nor a PEFT export of "
            "relora_ds; name a directory with recipe.yaml, manifest.json or config.json"
        )
    return "huggingface", str(path)


def config_of(source: str, trust_remote_code: bool = False, field: str = "source") -> PretrainedConfig:
    """Return a model's configuration. Arguments and errors: see `locate`; ValueError too where it cannot be read."""
    kind, path = locate(source, field)
    if kind == "peft":
        peft.verify(Path(path))
        path = str(Path(path) / peft.BASE)
    with _clear_errors(source, field):
        if kind == "checkpoint":
            return _saved_config(Path(path), trust_remote_code)
        config = load_config(path, trust_remote_code)
    return tied_as_stored(config, meta_model(config), path)


def model_of(source: str, trust_remote_code: bool = False, field: str = "source") -> PreTrainedModel:
    """Return the plain model, fp32 on CPU, updates merged. Arguments and errors: see `config_of`."""
    kind, path = locate(source, field)
    if kind == "checkpoint":
        return plain_model(Path(path), CheckpointWeights(Path(path)), torch.float32, trust_remote_code)
    if kind == "peft":
        return peft.load(Path(path), trust_remote_code=trust_remote_code).merge_and_unload()
    with _clear_errors(source, field):
        return load_model(path, torch.float32, trust_remote_code)


def weights_of(source: str, trust_remote_code: bool = False, field: str = "source") -> WeightSource:
    """Return the merged fp32 weights of the plain model, read one tensor at a time. Errors: see `config_of`."""
    kind, path = locate(source, field)
    if kind == "checkpoint":
        return CheckpointWeights(Path(path))
    config = config_of(source, trust_remote_code, field)
    with _clear_errors(source, field):
        if kind == "peft":
            return peft.merged_weights(Path(path), config, trust_remote_code)
        return pretrained_weights(path, config, trust_remote_code)


def tokenizer_of(source: str, field: str = "source") -> str:
    """Return where the tokenizer of a model is: what `data.tokenizer.load` takes."""
    kind, path = locate(source, field)
    return str(Path(path).parent / TOKENIZER) if kind == "checkpoint" else path


def plain_model(
    checkpoint: Path, weights: WeightSource, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the plain model of a checkpoint's configuration with `weights` in `dtype`; no other copy is in memory."""
    with _clear_errors(str(checkpoint), "checkpoint"):
        config = export_config(_saved_config(checkpoint, trust_remote_code))
    model = build_without_values(config, dtype=dtype)
    if (damage := _damage(checkpoint, "generation_config.json")) is not None:
        logger.warning("%s; the model is without it", damage)
    elif _lists(checkpoint, "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    if found := problems(weights, model):
        raise ValueError(found[0])
    return fill(model, weights)


def _saved_config(checkpoint: Path, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration beside a checkpoint's weights or, where that is damaged, the one in the manifest."""
    if not _lists(checkpoint, "config.json"):
        raise ValueError(
            f"{checkpoint}: the model that was trained is no transformers model (no config.json); use "
            "relora_ds.interop.hf_export.merged_state and save the tensors yourself"
        )
    if (damage := _damage(checkpoint, "config.json")) is not None:
        logger.warning("%s; the configuration in %s serves", damage, manifest.NAME)
        values = dict(manifest.read(checkpoint).model["config"])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return load_config(checkpoint, trust_remote_code)


def _lists(checkpoint: Path, name: str) -> bool:
    """Return True if a checkpoint consists of a small file of this name, among others."""
    return name in manifest.read(checkpoint).files


def _damage(checkpoint: Path, name: str) -> str | None:
    """Return what is wrong with a small file of a checkpoint, or None."""
    return next(iter(store.verify(checkpoint, lambda listed: listed == name)), None)


@contextmanager
def _clear_errors(source: str, field: str):
    try:
        yield
    except pickle.UnpicklingError as error:  # torch.load with weights_only: tensors and nothing else
        raise ValueError(
            f"{field}: {source} has weights in a pickle of more than tensors, which could run code; "
            "convert it to safetensors where you trust it"
        ) from error
    except UntrustedCode as error:
        raise ValueError(f"{field}: {error}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{field}: {source} cannot be loaded ({reason}); give a run, a checkpoint, a Hugging Face "
            "model, or a PEFT export of relora_ds"
        ) from error
