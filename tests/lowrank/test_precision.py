"""What is merged is multiplied in fp32, however the process multiplies elsewhere."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from relora_ds.lowrank.frozen import add_update_
from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.orthogonal import orthogonalized
from relora_ds.lowrank.precision import exact_products
from relora_ds.lowrank.reinit import GradientSketch

MATMULS = {"cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}
IEEE = {"cuda": "ieee", "mkldnn": "ieee"}


def choices() -> dict[str, str]:
    return {name: matmul.fp32_precision for name, matmul in MATMULS.items()}


class Products(TorchDispatchMode):
    """The choices at every product, and the dtypes multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removeprefix("aten::") in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            self.seen.append((choices(), {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}))
        return func(*args, **(kwargs or {}))

    def are_exact(self) -> bool:
        return bool(self.seen) and all(seen == (IEEE, {torch.float32}) for seen in self.seen)


def nothing() -> None:
    """Go back to what a process begins with."""
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cudnn, torch.backends.mkldnn, *MATMULS.values()):
        backend.fp32_precision = "none"


CHOOSE = {
    "nothing": lambda: None,
    "the older way": lambda: torch.set_float32_matmul_precision("high"),  # as allow_tf32 = True
    "the older way, bf16": lambda: torch.set_float32_matmul_precision("medium"),
    "the newer way": lambda: [setattr(matmul, "fp32_precision", "tf32") for matmul in MATMULS.values()],
    "for all operations": lambda: [
        setattr(backend, "fp32_precision", "tf32") for backend in (torch.backends.cudnn, torch.backends.mkldnn)
    ],
}


@pytest.fixture(params=CHOOSE)
def chosen(request):
    nothing()
    CHOOSE[request.param]()
    yield choices()
    nothing()


def merge() -> None:
    layer = ReLoRALinear(5, 7, torch.nn.Parameter(torch.randn(7, 5)), None, r=2, lora_alpha=4)
    torch.nn.init.normal_(layer.lora_A), torch.nn.init.normal_(layer.lora_B)
    layer.merged_weight()


def add_update() -> None:
    add_update_(torch.randn(7, 5), torch.randn(2, 5), torch.randn(7, 2), 2.0)


def sketch() -> None:
    GradientSketch(2, 5, "key").add(torch.randn(3, 7, dtype=torch.bfloat16), torch.randn(3, 5, dtype=torch.bfloat16))


def gradient_sum() -> None:
    GradientSum(torch.Size((7, 5))).add(torch.randn(3, 7), torch.randn(3, 5))


def orthogonal() -> None:
    orthogonalized(torch.randn(7, 5))


@pytest.mark.parametrize("multiply", [merge, add_update, sketch, gradient_sum, orthogonal])
@pytest.mark.parametrize("under_autocast", [False, True])
def test_what_is_merged_is_multiplied_in_fp32(multiply, under_autocast, chosen):
    with Products() as products, torch.autocast("cpu", enabled=under_autocast, dtype=torch.bfloat16):
        multiply()
    assert products.are_exact()
    assert choices() == chosen


@pytest.mark.parametrize(("dtype", "on_cpu"), [(torch.bfloat16, "bf16"), (torch.float16, "ieee")])
def test_products_of_16_bit_are_in_what_keeps_their_bits(dtype, on_cpu, chosen):
    g, rows = torch.randn(3, 7).to(dtype), torch.randn(3, 5).to(dtype)
    for value in (g, rows):  # TF32 has 10 bits behind the first one
        assert not (value.float().view(torch.int32) & 0x1FFF).any()
    with Products() as products:
        GradientSum(torch.Size((7, 5))).add(g, rows)
    assert products.seen == [({"cuda": "tf32", "mkldnn": on_cpu}, {torch.float32})]
    assert choices() == chosen


def test_a_sum_of_bf16_products_is_that_of_fp32_products():
    """Where the CPU has units for bf16, which add up in fp32; elsewhere it multiplies in fp32."""
    generator = torch.Generator().manual_seed(0)
    g, rows = (torch.randn(256, n, generator=generator).bfloat16() for n in (96, 64))
    total = GradientSum(torch.Size((96, 64)))
    total.values.normal_(std=100, generator=generator)
    expected = total.values.double() + g.double().t() @ rows.double()
    total.add(g, rows)
    torch.testing.assert_close(total.values.double(), expected, rtol=1e-6, atol=1e-5)


def test_the_choice_is_restored_after_an_exception(chosen):
    with pytest.raises(KeyError), exact_products():
        assert choices() == IEEE
        raise KeyError
    assert choices() == chosen


def test_what_follows_another_choice_goes_on_following_it():
    nothing()
    torch.backends.cudnn.fp32_precision = "tf32"
    with exact_products():
        pass
    torch.backends.cudnn.fp32_precision = "ieee"
    try:
        assert choices()["cuda"] == "ieee"
    finally:
        nothing()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_older_functions_of_torch_are_asked_where_there_are_no_newer_ones(precision, monkeypatch):
    torch.set_float32_matmul_precision(precision)
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(allow_tf32=precision != "highest"))
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        nothing()
