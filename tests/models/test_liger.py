"""model.use_liger_kernel: refused with a reason where it cannot run, else applied to the model that is trained."""

import importlib.util
import sys
import types

import pytest
import torch

from relora_ds import ReLoRAConfig, wrap
from relora_ds.models import liger
from relora_ds.training.preflight import machine_problems, resolve
from tests.small_models import gpt_neox, llama

OTHERWISE = "use model.use_liger_kernel=false"


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """A stand-in for liger-kernel that knows LLaMA; what it is asked to do."""
    found = []
    package, transformers = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    transformers._apply_liger_kernel_to_instance = lambda model, **options: found.append((model, options))
    for module in (package, transformers, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def test_without_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = ["model.use_liger_kernel: true needs a CUDA device, and there is none here; " + OTHERWISE]
    assert liger.problems(llama()) == expected
    with pytest.raises(ValueError, match="model.use_liger_kernel: true needs a CUDA device"):
        liger.apply(llama())
    options = [f"run_dir={tmp_path / 'run'}", "model.use_liger_kernel=true"]
    assert machine_problems(resolve("tiny", options, to_run=False).recipe) == expected
    with pytest.raises(ValueError, match="model.use_liger_kernel: true needs a CUDA device"):
        resolve("tiny", options)


def test_without_the_library(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    (problem,) = liger.problems(llama())
    assert problem.startswith("model.use_liger_kernel: true needs liger-kernel (")
    assert problem.endswith("); pip install liger-kernel, or " + OTHERWISE)


def test_a_family_that_it_does_not_know(cuda, calls):
    assert liger.problems(gpt_neox()) == [
        "model.use_liger_kernel: true is not supported: liger-kernel has nothing for gpt_neox models; " + OTHERWISE
    ]


@pytest.mark.parametrize("targets, fused_loss", [("all-linear", True), (["q_proj", "lm_head"], False)])
def test_a_wrapped_head_keeps_its_own_product(cuda, calls, targets, fused_loss):
    """The fused loss reads the head's weight, and would train and apply no low-rank update of it."""
    model = wrap(llama(), ReLoRAConfig(r=4, target_modules=targets))
    assert liger.apply(model) is model
    assert calls == [(model, {"fused_linear_cross_entropy": fused_loss})]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_with_the_library(monkeypatch):
    """The kernels replace the forward functions of a wrapped model; its linears and names stay."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    from transformers.models.llama import modeling_llama

    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):  # it replaces them, for all models to come
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = wrap(llama(), ReLoRAConfig(r=4))
    names = [name for name, _ in model.named_parameters()]
    liger.apply(model)
    layer = model.model.layers[0]
    assert model.model.norm.forward.__func__ is layer.input_layernorm.forward.__func__ is LigerRMSNorm.forward
    assert layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward
    assert model.forward.__func__ is not type(model).forward
    assert [name for name, _ in model.named_parameters()] == names
