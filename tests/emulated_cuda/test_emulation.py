"""The emulation itself: it notices what CUDA and NCCL refuse, and counts."""

import gc

import pytest
import torch
import torch.distributed as dist

from tests.emulated_cuda.gpu import EmulatedCuda
from tests.emulated_cuda.rules import DeviceError


@pytest.fixture
def gpu():
    with EmulatedCuda(devices=2) as emulation:
        yield emulation


@pytest.fixture
def group(gpu):
    """A process group of NCCL, of one rank."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_gpu(*shape, **how) -> torch.Tensor:
    return torch.ones(*shape, device="cuda", **how)


# -- where tensors are -----------------------------------------------------------------------------------------------
def test_torch_says_that_there_are_gpus(gpu):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    assert torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x + 1,
        lambda x: x[1:],
        lambda x: x[x > 0],
        lambda x: x.to(torch.bfloat16),
        lambda x: x.clone().t(),
        torch.zeros_like,
        lambda x: x.new_empty(3),
        lambda x: torch.cat([x, x]),
        lambda x: x @ x.t(),
        lambda x: torch.nn.Parameter(x),
        lambda x: torch.ones(2).to(x),
        lambda x: torch.ones(2).cuda(),
        lambda x: torch.empty(0, device=x.device).resize_(5),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
)
def test_what_is_made_on_a_gpu_is_there(gpu, make):
    made = make(on_gpu(2, 3))
    assert made.device == torch.device("cuda", 0) and made.is_cuda and not made.is_cpu


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu", copy=True),
        lambda x: torch.ones(2),
        lambda x: torch.zeros_like(x, device="cpu"),
        lambda x: torch.tensor(x.tolist()),
    ],
)
def test_what_is_made_on_the_host_is_there(gpu, make):
    made = make(on_gpu(2, 3))
    assert made.device == torch.device("cpu") and not made.is_cuda


def test_a_gradient_is_where_its_parameter_is(gpu):
    weight = torch.nn.Parameter(on_gpu(3, 3))
    (weight @ on_gpu(3)).sum().backward()
    assert weight.grad.device == weight.device


def test_the_current_device_counts_where_no_index_is_given(gpu):
    torch.cuda.set_device(1)
    assert on_gpu(1).device.index == 1
    with torch.cuda.device(0):
        assert on_gpu(1).device.index == 0


def test_afterwards_there_are_no_gpus_again():
    with EmulatedCuda():
        on_gpu(1)
    assert not torch.cuda.is_available() and torch.ones(1).device.type == "cpu"
    assert torch.Generator().device.type == "cpu"


# -- what CUDA refuses -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3, 3) @ x,
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: x.addmm_(torch.ones(3, 3), torch.ones(3, 3)),
        lambda x: x.index_add_(0, torch.zeros(1, dtype=int), x[:1]),
        lambda x: torch.ones(3)[torch.zeros(1, dtype=int, device="cuda")],
        lambda x: x + x.to("cuda:1"),
        lambda x: torch.where(torch.ones(3) > 0, x, x),
    ],
)
def test_a_mix_of_devices_is_noticed(gpu, mix):
    with pytest.raises(DeviceError, match="on the same device"):
        mix(on_gpu(3))


def test_a_mix_in_backward_is_noticed(gpu):
    class Mixes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(3)

    with pytest.raises(DeviceError):
        Mixes.apply(on_gpu(3, requires_grad=True)).sum().backward()


def test_a_mix_inside_a_kernel_of_relora_ds_is_noticed(gpu):
    from relora_ds.lowrank import kernels

    with pytest.raises(DeviceError):
        kernels.product(on_gpu(3, 3), torch.ones(3, 3))


@pytest.mark.parametrize(
    "fine",
    [
        lambda x: x * torch.tensor(2.0),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.to("cuda:1"),
    ],
)
def test_what_cuda_allows_passes(gpu, fine):
    assert fine(on_gpu(3)).is_cuda


def test_numpy_wants_tensors_of_the_host(gpu):
    with pytest.raises(TypeError, match="can't convert cuda"):
        on_gpu(3).numpy()
    assert on_gpu(3).cpu().numpy().sum() == 3


def test_a_gpu_that_is_not_there_is_refused(gpu):
    with pytest.raises(DeviceError, match="invalid device ordinal 2"):
        torch.ones(1, device="cuda:2")


@pytest.mark.parametrize(
    "draw",
    [
        lambda g, device: torch.randn(3, generator=g, device=device),
        lambda g, device: torch.zeros(3, device=device).uniform_(generator=g),
        lambda g, device: torch.randint(5, (3,), generator=g, device=device),
    ],
)
def test_a_generator_of_another_device_is_refused(gpu, draw):
    host, own = torch.Generator(), torch.Generator(device="cuda")
    assert draw(own, "cuda").is_cuda and not draw(host, "cpu").is_cuda
    for generator, device in ((host, "cuda"), (own, "cpu")):
        with pytest.raises(DeviceError, match="device type for generator"):
            draw(generator, device)


def fp8(rows, columns, **how):
    return torch.ones(rows, columns, device="cuda", **how).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b, s: (a, b.t().contiguous(), s, s, torch.bfloat16),  # the second operand by rows
        lambda a, b, s: (a.t().contiguous().t(), b, s, s, torch.bfloat16),  # the first by columns
        lambda a, b, s: (a[:, :8], b[:8], s, s, torch.bfloat16),
        lambda a, b, s: (a, b, s, s, torch.float32),
        lambda a, b, s: (a, b, s.bfloat16(), s, torch.bfloat16),
        lambda a, b, s: (a.view(-1)[8 : 8 + 16 * 16].view(16, 16), b[:16], s[:16], s[:, :16], torch.bfloat16),
    ],
)
def test_scaled_mm_wants_the_layout_of_its_kernel(gpu, wrong):
    a, b, scales = fp8(32, 32), fp8(32, 32).t(), torch.ones(32, 1, device="cuda")
    right = torch._scaled_mm(a, b, scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    assert right[0, 0] == 32
    a, b, scale_a, scale_b, dtype = wrong(a, b, scales)
    with pytest.raises((DeviceError, RuntimeError, ValueError)):
        torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b.reshape(1, -1), out_dtype=dtype)


# -- what NCCL refuses -----------------------------------------------------------------------------------------------
def test_nccl_sends_tensors_of_the_current_gpu(gpu, group):
    dist.all_reduce(on_gpu(3))
    assert gpu.collectives["c10d::allreduce_"] == 1
    with pytest.raises(DeviceError, match="on the host"):
        dist.all_reduce(torch.ones(3))
    with pytest.raises(DeviceError, match="the current device is cuda:0"):
        dist.broadcast(torch.ones(3, device="cuda:1"), 0)


def test_nccl_lacks_dtypes(gpu, group):
    with pytest.raises(DeviceError, match="torch.int16"):
        dist.all_reduce(on_gpu(3, dtype=torch.int16))


def test_nccl_sends_contiguous_tensors(gpu, group):
    with pytest.raises(DeviceError, match="not contiguous"):
        dist.broadcast(on_gpu(3, 4).t(), 0)


def test_a_group_of_gloo_sends_tensors_of_the_host(gpu, group):
    host = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(3), group=host)
    assert dist.get_backend() == "nccl" and dist.get_backend(host) == "gloo"


def test_objects_are_sent(gpu, group):
    found = [None]
    dist.all_gather_object(found, {"a": 1})
    assert found == [{"a": 1}]


# -- what makes the host wait ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("wait", "what"),
    [
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: bool(x[0] > 0), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: torch.ones(3).copy_(x), "copy to the host"),
        (lambda x: torch.ones(3).cuda(), "copy of pageable or blocking memory to the GPU"),
        (lambda x: x.copy_(torch.ones(3)), "copy of pageable or blocking memory to the GPU"),
        (lambda x: torch.tensor([1.0], device="cuda"), "copy of pageable or blocking memory to the GPU"),
        (lambda x: torch.cuda.synchronize(), "torch.cuda.synchronize"),
    ],
)
def test_what_waits_is_counted(gpu, wait, what):
    x = on_gpu(3)
    gpu.syncs.clear()
    wait(x)
    assert [found for found, _ in gpu.syncs.elements()] == [what]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum() * 2,
        lambda x: x.fill_(3),
        lambda x: x.__setitem__(0, 2.0),
        lambda x: torch.full((3,), 2, device="cuda"),
        lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    ],
)
def test_what_does_not_wait_is_not(gpu, work):
    x = on_gpu(3)
    work(x)
    assert not gpu.syncs


def test_a_place_is_a_function_of_a_package(gpu):
    from relora_ds.lowrank.reinit import dominant_rows

    dominant_rows(on_gpu(4, 4), 2)
    assert gpu.syncs.places("relora_ds") == {"relora_ds/lowrank/reinit.py:dominant_rows": 3}
    assert gpu.syncs.places("deepspeed") == {}


# -- memory ----------------------------------------------------------------------------------------------------------
def test_live_and_peak_bytes_are_counted_by_gpu(gpu):
    a, b = on_gpu(256), torch.ones(100, device="cuda:1")
    view = a[3:]
    assert torch.cuda.memory_allocated() == 1024 and torch.cuda.memory_allocated(1) == 400
    host = a.cpu()
    assert torch.cuda.max_memory_allocated() == 1024, "a copy on the host takes nothing"
    del a
    assert torch.cuda.memory_allocated() == 1024, "the view holds it"
    del view, b
    gc.collect()
    assert torch.cuda.memory_allocated() == torch.cuda.memory_allocated(1) == 0
    assert torch.cuda.max_memory_allocated() == 1024 and host.sum() == 256
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 0


def test_pinned_memory_comes_in_powers_of_two_and_is_kept(gpu):
    first = torch.ones(300).pin_memory()
    assert first.is_pinned() and gpu.memory.pinned.held == 2048
    del first
    assert gpu.memory.pinned.used == 0
    second = torch.empty(400, pin_memory=True)
    assert gpu.memory.pinned.held == 2048, "the same block again"
    third = torch.empty(512, pin_memory=True)
    assert gpu.memory.pinned.held == gpu.memory.pinned.used == 4096 and second.is_pinned() and third.is_pinned()


def test_registered_memory_has_the_size_that_it_has(gpu):
    tensor = torch.ones(300)
    torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), 1200, 1)
    assert tensor[5:].is_pinned() and gpu.memory.pinned.held == gpu.memory.pinned.used == 1200
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    assert not tensor.is_pinned() and gpu.memory.pinned.held == gpu.memory.pinned.used == 0
