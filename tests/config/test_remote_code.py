"""Code that comes with a model or a tokenizer runs where trust_remote_code says so, and nobody is ever asked."""

import builtins
import io
import json
import shutil
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from relora_ds.__main__ import main
from relora_ds.config import RecipeError
from relora_ds.config.remote_code import UntrustedCode
from relora_ds.data import tokenizer
from relora_ds.interop import peft, sources
from relora_ds.interop.hf_export import export
from relora_ds.models.build import meta_model
from relora_ds.models.loading import load_config
from relora_ds.training.preflight import check, resolve
from relora_ds.training.trainer import Trainer
from tests.ranks import ranks

SETTINGS = ("train.steps=14", "checkpoint.every=12", "model.preset=null", "log.every=5", "eval.samples=1")
TOKENIZER = """
from pathlib import Path
from transformers import LlamaTokenizer
Path({marker!r}).touch()

class OwnTokenizer(LlamaTokenizer):
    pass
"""
MODEL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def trained_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(["The quick brown fox jumps over the lazy dog. 0123456789\n"] * 50, 300, directory)
    return directory


@pytest.fixture
def places(tmp_path, trained_tokenizer):
    """(a tokenizer and a model with code of their own, the file that this code makes)."""
    marker = tmp_path / "ran"
    for name, code in (("tok", TOKENIZER), ("model", MODEL)):
        shutil.copytree(trained_tokenizer, tmp_path / name)
        (tmp_path / name / f"own_{name}.py").write_text(code.format(marker=str(marker)))
    path = tmp_path / "tok" / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": ["own_tok.OwnTokenizer", None]},
            }
        )
    )
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(
            {
                **SIZES,
                "model_type": "own",
                "architectures": ["OwnForCausalLM"],
                "auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"},
            }
        )
    )
    return tmp_path / "tok", tmp_path / "model", marker


@pytest.fixture(autouse=True)
def answers(monkeypatch, tmp_path):
    """Whoever asks is answered yes; gives the questions. Code is copied to a place of this test."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield asked
    assert asked == []


def overrides(tmp_path: Path, tok: Path, model: Path, trust: bool) -> list[str]:
    return [
        f"run_dir={tmp_path / 'run'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"data.tokenizer={tok}",
        f"model.name_or_path={model}",
        f"trust_remote_code={str(trust).lower()}",
        *SETTINGS,
    ]


def test_a_tokenizers_code_does_not_run(places, tmp_path, trained_tokenizer):
    tok, model, marker = places
    with pytest.raises(ValueError, match="^data.tokenizer: .*code of its own.*trust_remote_code=true"):
        tokenizer.load(tok)
    own = ["model.name_or_path=null", "model.preset=tiny"]
    with pytest.raises(RecipeError, match="data.tokenizer: .*trust_remote_code=true"):
        check("tiny", [*overrides(tmp_path, tok, model, False), *own])
    assert main(["check", "tiny", *overrides(tmp_path, tok, model, False), *own]) == 2
    assert main(["prepare", "--config", "tiny", str(tmp_path / "out"), f"data.tokenizer={tok}"]) != 0
    assert not marker.exists()
    tokenizer.load(tok, trust_remote_code=True)
    assert marker.exists()


def test_a_models_code_does_not_run(places, tmp_path, capsys):
    tok, model, marker = places
    given = overrides(tmp_path, model, model, False)
    for refused in (
        lambda: sources.config_of(str(model)),
        lambda: sources.model_of(str(model)),
        lambda: sources.weights_of(str(model)),
    ):
        with pytest.raises(ValueError, match="^source: .*code of its own.*trust_remote_code=true"):
            refused()
    for refused in (lambda: resolve("tiny", given), lambda: check("tiny", given)):
        with pytest.raises(RecipeError, match="model.name_or_path: .*code of its own.*trust_remote_code=true"):
            refused()
    for arguments in (["check", "tiny", *given], ["estimate", "tiny", *given], ["train", "--config", "tiny", *given]):
        assert main(arguments) == 2
        assert "trust_remote_code=true" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 50)
    assert main(["eval", str(model), "--data", str(text)]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model_type", ["llama", "vit"])
def test_a_known_configuration_with_code_beside_it(places, model_type):
    """transformers asks here where it is told nothing: the configuration is its own, the model is not."""
    _, model, marker = places
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(
            {
                **about,
                "model_type": model_type,
                "attn_implementation": "someone/kernel",
                "auto_map": {"AutoModelForCausalLM": "own_model.OwnForCausalLM"},
            }
        )
    )
    if model_type == "llama":
        meta_model(load_config(model, trust_remote_code=False))
    else:
        with pytest.raises(UntrustedCode):
            load_config(model, trust_remote_code=False)
    assert not marker.exists()


def train(given: list[str], modules: str) -> float:
    """On a rank: the validation loss of a run."""
    dynamic_module_utils.HF_MODULES_CACHE = modules
    return Trainer(check("tiny", given)).fit()["val_loss"]


@pytest.mark.slow
def test_trusted_code_reaches_every_part(places, tmp_path, capsys):
    tok, model, marker = places
    (loss,) = ranks(1).run(train, overrides(tmp_path, tok, model, True), str(tmp_path / "modules"))
    assert marker.exists()
    run = tmp_path / "run"
    assert {"own_tok.py", "own_model.py"} <= {path.name for path in (run / "export").iterdir()}
    data = ["--data", str(run), f"data.cache_dir={tmp_path / 'cache'}"]
    for source in (run, run / "checkpoints" / "step_00000012"):
        assert main(["eval", str(source), "--trust-remote-code", "--json", *data]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert source != run or printed["val_loss"] == pytest.approx(loss, rel=1e-5)
    export(run, tmp_path / "bf16", dtype="bf16", trust_remote_code=True)
    export(run, tmp_path / "peft", checkpoint="step_00000012", format="peft", trust_remote_code=True)
    peft.load(tmp_path / "peft", trust_remote_code=True)

    # The same without a word of trust. Another text makes the code new to this process.
    marker.unlink()
    for code in run.parent.rglob("*own*.py"):
        if "modules" not in code.parts:
            code.write_text(code.read_text() + "\n# as somebody else would have written it\n")
    for refused in (
        lambda: export(run, tmp_path / "a", dtype="bf16"),
        lambda: export(run, tmp_path / "b", checkpoint="step_00000012"),
        lambda: peft.load(tmp_path / "peft"),
    ):
        with pytest.raises(ValueError, match="trust_remote_code=true"):
            refused()
    for arguments in (["eval", str(run), *data], ["eval", str(run / "checkpoints" / "step_00000012"), *data]):
        assert main(arguments) == 1
    assert not marker.exists()
