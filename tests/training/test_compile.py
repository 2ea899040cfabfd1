"""compile: one graph for the whole run, the same numbers, and a clear word where a machine cannot.

Most tests take torch's `aot_eager` backend, which traces as `inductor` does and generates no code: it takes seconds
instead of minutes.
"""

import functools
import shutil
import sysconfig
import types

import pytest
import torch
from torch._dynamo.utils import counters

import relora_ds
from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import DENSE, format_named
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.models import compilation, recompute
from relora_ds.training.preflight import check, resolve
from relora_ds.training.trainer import Trainer
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch, llama
from tests.training.runs import lines, losses

FORMATS = ["dense", "int8", "nf4"]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    counters.clear()


def without_code(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def small(format: str, mode: str = "none"):
    """A wrapped LLaMA whose frozen weights are stored in `format`."""
    model = llama(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    relora_ds.wrap(model, ReLoRAConfig(r=4))
    if format != "dense":
        for layer in lowrank_layers(model).values():
            store(layer, format)
    return recompute.apply(model.train(), mode)


def store(layer: ReLoRALinear, format: str) -> None:
    packed = format_named(format)
    layer.store_weight(packed.quantize(layer.weight.detach(), torch.float32), packed, as_buffer=False)


@torch.no_grad()
def restart(layer: ReLoRALinear) -> None:
    """What a restart does to a layer: new values in the same tensors."""
    merged = layer.merged_weight()
    layer.weight.copy_(merged if layer.format is DENSE else layer.format.quantize(merged, torch.float32))
    torch.nn.init.normal_(layer.lora_A, std=0.2)
    layer.lora_B.zero_()


def gradients(model, tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one, other, rel: float) -> None:
    assert other[0] == pytest.approx(one[0], rel=rel)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert (other[1][name] - value).norm() <= rel * value.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("format", ["dense", "bf16", "int8", "fp8", "nf4"])
def test_the_layer_is_one_graph_and_a_restart_compiles_nothing(format, dropout):
    weight, bias = torch.nn.Parameter(torch.randn(48, 32)), torch.nn.Parameter(torch.randn(48))
    layer = ReLoRALinear(32, 48, weight, bias, r=4, lora_alpha=8, lora_dropout=dropout)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    if format != "dense":
        store(layer, format)
    x = torch.randn(2, 5, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = []
        for each in (layer, compiled):
            torch.manual_seed(0)
            found.append(torch.autograd.grad(each(x).square().sum(), [x, layer.lora_A, layer.lora_B, layer.bias]))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        restart(layer)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "format, mode",
    [
        ("int8", "cheap"),
        *(
            pytest.param(format, mode, marks=pytest.mark.slow)
            for format, mode in (
                ("dense", "none"),
                ("dense", "full"),
                ("dense", "selective"),
                ("dense", "cheap"),
                ("nf4", "none"),
            )
        ),
    ],
)
def test_a_model_is_one_graph(format, mode, monkeypatch):
    """Training alone is compiled, once: not again by a restart, by another mode, or by batches of other shapes."""
    plain, model = small(format), small(format, mode)
    names = [name for name, _ in model.named_parameters()]
    without_code(monkeypatch)
    compilation.apply(model)
    for step in range(2):
        tokens = batch(step, 3)
        assert_close(gradients(plain, tokens), gradients(model, tokens), rel=1e-6)
        model.eval()
        with torch.no_grad():
            for size in (3, 2, 1):
                logits = model(input_ids=batch(step, size)).logits
                assert torch.equal(logits, plain(input_ids=batch(step, size)).logits)
        model.train()
        for each in (plain, model):
            torch.manual_seed(step)
            for layer in lowrank_layers(each).values():
                restart(layer)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model, type(plain)) and isinstance(model.forward, types.MethodType)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_generated_code_computes_the_same(format):
    plain, model = small(format), compilation.apply(small(format))
    assert_close(gradients(plain, batch(0, 3)), gradients(model, batch(0, 3)), rel=1e-5)


@pytest.mark.slow
def test_checkpointing_keeps_less_in_a_compiled_model():
    def kept(mode: str) -> int:
        torch._dynamo.reset()
        model = small("dense", mode)
        model.compile(backend="aot_eager_decomp_partition")  # what is kept is decided here, as by inductor
        tokens, parameters, found = batch(0, 8), {p.data_ptr() for p in model.parameters()}, {}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens, labels=tokens)
        return sum(found.values())

    full, selective, cheap, none = (kept(mode) for mode in ("full", "selective", "cheap", "none"))
    assert full < selective < cheap < none


def train(stage: int, compiled: bool, mode: str, frozen_dtype: str, accumulation: int) -> dict:
    """Five steps with a restart after the third, and logits in between."""
    torch._dynamo.reset()
    counters.clear()
    relora = cases.relora_config(restart_every=3, restart_warmup_steps=1, frozen_dtype=frozen_dtype)
    model = llama(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    recompute.apply(relora_ds.wrap(model, relora), mode)
    engine, *_ = relora_ds.initialize(
        model,
        cases.ds_settings(stage, "fp32"),
        relora,
        lr=1e-2,
        total_steps=cases.STEPS,
        micro_batch_size=cases.GLOBAL_BATCH // (2 * accumulation),
        gradient_accumulation_steps=accumulation,
    )
    engine.drift_probe = lambda: engine.module(input_ids=batch(99, 4)).logits
    if compiled:
        with pytest.MonkeyPatch.context() as monkeypatch:
            without_code(monkeypatch)
            compilation.apply(engine.module)
    found = {"losses": [], "logits": []}
    for step in range(5):
        found["losses"].append(cases.train_step(engine, step))
        found["logits"].append(cases.logits(engine).sum().item())
    found |= {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": dict(counters["graph_break"]),
        "drift": engine.last_restart.merge_drift,
    }
    assert engine.restarts == [3]
    cases.release(engine)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, mode, frozen_dtype, accumulation",
    [(0, "none", "auto", 1), (1, "cheap", "auto", 2), (2, "none", "int8", 2), (1, "full", "nf4", 1)],
)
def test_an_engine_is_one_graph(stage, mode, frozen_dtype, accumulation):
    plain = ranks(2).run(train, stage, False, mode, frozen_dtype, accumulation)[0]
    found = ranks(2).run(train, stage, True, mode, frozen_dtype, accumulation)[0]
    assert found["graphs"] == 1 and not found["breaks"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert found["logits"] == pytest.approx(plain["logits"], rel=1e-4)
    assert found["drift"] is not None


RECIPE = [
    "train.steps=12",
    "warm_start_steps=4",
    "relora.restart_every=4",
    "relora.restart_warmup_steps=1",
    "optim.warmup_steps=1",
    "log.every=1",
    "eval.every=6",
    "checkpoint.every=null",
]


def train_recipe(overrides: list[str]) -> tuple[int, float]:
    """The number of compiled graphs, and the last validation loss."""
    torch._dynamo.reset()
    counters.clear()
    summary = Trainer(check("tiny", overrides)).fit()
    return counters["stats"]["unique_graphs"], summary["val_loss"]


@pytest.mark.slow
def test_a_recipe_that_is_compiled(tmp_path):
    """Generated code through warm start, transition, restart, evaluation, samples, export: one graph for each phase."""

    def train(name: str, *overrides: str):
        return ranks(1).run(train_recipe, [f"run_dir={tmp_path / name}", *RECIPE, *overrides], timeout=600)[0]

    graphs, val_loss = train("plain")
    assert graphs == 0
    graphs, compiled = train("compiled", "compile=true", "activation_checkpointing=selective")
    assert graphs == 2 and compiled == pytest.approx(val_loss, rel=1e-4)
    assert len(lines(tmp_path / "compiled", "restart")) == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert (tmp_path / "compiled" / "export" / "model.safetensors").is_file()
    assert train("zero3", "compile=true", "deepspeed=zero3")[0] == 0


def test_zero_3_is_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "problems", list)
    overrides = [f"run_dir={tmp_path / 'run'}", "compile=true"]
    found = [warning for warning in resolve("tiny", [*overrides, "deepspeed=zero3"]).warnings() if "compile" in warning]
    assert found == [
        "compile: true has no effect at ZeRO stage 3, whose hooks stand between all layers; use a "
        "configuration of stages 0 to 2"
    ]
    assert not any("compile" in warning for warning in resolve("tiny", [*overrides, "deepspeed=zero2"]).warnings())


def test_a_machine_that_cannot_compile(monkeypatch, tmp_path):
    def says(what: str) -> bool:
        (problem,) = compilation.problems()
        return problem == f"compile: true needs {what}; install what is missing, or use compile=false"

    found = {"g++", "clang"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    headers = f"Python's headers ({tmp_path / 'Python.h'} is not there; Linux distributions have them in python3-dev)"
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says(headers)
    (tmp_path / "Python.h").touch()
    assert compilation.problems() == []
    monkeypatch.setenv("CXX", "clang++-18")
    assert says("a compiler (clang++-18 is not found; CXX names another one)")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compilation, "_has_triton", lambda: False)
    assert says("triton, which torch's CUDA builds bring, and a GPU of compute capability 7.0 or newer")
    monkeypatch.setattr(compilation, "_has_triton", lambda: True)
    assert compilation.problems() == []
    found.remove("clang")
    assert says("a compiler (gcc or clang is not found; CC names another one)")
