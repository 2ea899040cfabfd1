"""Products of what is merged, in full fp32.

A process may have fp32 products computed in less: TF32 on CUDA (`TrainingArguments(tf32=True)`,
`torch.set_float32_matmul_precision("high")`, NVIDIA's containers by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1), bf16 on CPUs
that have it, 16 bit under autocast. An update s·B·A so computed has a relative error of about 5e-4 or more, which the
masters would take over at every restart.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_products(of: torch.dtype = torch.float32) -> Iterator[None]:
    """Have fp32 products computed in fp32, in the whole process, for as long as it lasts.

    of: what the operands were before they became fp32. What keeps all of their bits and adds up in fp32 may multiply
        them, several times as fast: TF32 on CUDA where they were bf16 or fp16, a CPU's bf16 units where they were bf16.
    """
    restore = _choose_fp32(
        "ieee" if of == torch.float32 else "tf32",
        "bf16" if of == torch.bfloat16 else "ieee",
    )
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        restore()


def _choose_fp32(on_cuda: str, on_cpu: str) -> Callable[[], None]:
    """Choose what multiplies fp32 ("ieee" is fp32 itself); returns what goes back to the choice before."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if on_cuda == "tf32" else "highest")
        return functools.partial(torch.set_float32_matmul_precision, chosen)
    # The older functions refuse to be asked once the newer ones were used, and these know all that those have chosen.
    before = [
        (backend.matmul, _own_precision(backend.matmul, parent))
        for backend, parent in (
            (torch.backends.cuda, torch.backends.cudnn),
            (torch.backends.mkldnn, torch.backends.mkldnn),
        )
    ]
    (of_cuda, _), (of_cpu, _) = before
    _set_precisions([(of_cuda, on_cuda), (of_cpu, on_cpu)])
    return functools.partial(_set_precisions, before)


def _own_precision(matmul, parent) -> str:
    """Return a backend's precision of products; "none" where they follow the backend's choice for all operations."""
    chosen = matmul.fp32_precision
    return "none" if chosen == parent.fp32_precision else chosen


def _set_precisions(choices: list[tuple[Any, str]]) -> None:
    for matmul, precision in choices:
        matmul.fp32_precision = precision
