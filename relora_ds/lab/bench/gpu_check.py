"""Is all right on this GPU, and how fast is it? One command of a few minutes, the most valuable first.

    correctness     the tests of tests/cuda
    speed           a training step of two LLaMA networks: full rank, PEFT on DeepSpeed, ours
    several GPUs    the smaller one at ZeRO stages 1 and 3 on all GPUs, over NCCL
    restart         the pause
    layer           one layer in every storage format

Each result is in the file as soon as it is known: a check that is killed leaves what it has measured. Nothing that
fails ends the check. Each part has a share of the time; what it leaves is the next one's, and what is not begun when
the time is up is recorded as such.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from relora_ds.lab.bench.baselines import COMPARED, FULL, Spec
from relora_ds.lab.bench.gpu_report import label, markdown, suspicious  # noqa: F401 (markdown: of every benchmark)
from relora_ds.lab.bench.watched import Process
from relora_ds.lowrank.formats import format_named
from relora_ds.models import compilation
from relora_ds.models.flops import peak_flops
from relora_ds.utils.versions import version_of

TESTS = Path(__file__).parents[3] / "tests" / "cuda"
# The most telling first; compiling takes the longest.
ORDER = (
    FULL,
    "ours, dense",
    "PEFT, same modules train",
    "PEFT, its default",
    "ours, fp8",
    "ours, int8",
    "ours, nf4",
    "ours, recomputed",
    "ours, compiled",
    "full rank, compiled",
)
SHARES = {"correctness": 5, "speed at 350M": 3, "several GPUs": 2, "speed at 1.3B": 3, "restart": 2, "layer": 1}
OUT_OF_TIME = "the time was up"


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large all is. Attributes: presets: by name of the part, with the micro-batch."""

    presets: dict[str, tuple[str, int]]
    shape: dict
    repeats: int
    restarts: int
    tokens_per_step: int
    layer: tuple[str, ...]


WHOLE = Scale(
    {"speed at 350M": ("llama_350m", 8), "speed at 1.3B": ("llama_1b_aligned", 4)},
    {"r": 128, "vocab_size": 32_000, "seq_len": 1024, "precision": "bf16"},
    repeats=5,
    restarts=3,
    tokens_per_step=524_288,
    layer=("--precision", "bf16", "--hidden", "1024", "2048", "4096", "--r", "128"),
)
TINY = Scale(
    {"speed at 350M": ("tiny", 1), "speed at 1.3B": ("llama_9m", 1)},
    {"r": 8, "vocab_size": 512, "seq_len": 32, "precision": "bf16"},
    repeats=1,
    restarts=1,
    tokens_per_step=512,
    layer=("--precision", "bf16", "--hidden", "64", "--r", "4", "--rows", "8", "--repetitions", "1"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=float,
        default=12,
        metavar="N",
        help="when it ends, whatever is left then (default: %(default)s)",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="networks of no size, also on a machine without a GPU: to see that all of it runs",
    )


def run(arguments: argparse.Namespace) -> dict:
    """Do all parts, and write `arguments.out` after each result.

    Raises:
        ValueError: there is no GPU, or no time.
    """
    if arguments.minutes <= 0:
        raise ValueError(f"--minutes: {arguments.minutes:g} is no time; give more than 0")
    if not torch.cuda.is_available() and not arguments.tiny:
        raise ValueError("gpu-check: PyTorch sees no GPU here; --tiny runs all of it on the CPU, to try it out")
    check = Check(TINY if arguments.tiny else WHOLE, 60 * arguments.minutes, arguments.out)
    # So that the process of the job, which has a session of its own, does not stay on the GPU.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        check.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    return check.result


def exit_code(result: dict) -> int:
    """1 where a test failed or something could not be measured."""
    return int(bool(suspicious(result)))


class Check:
    """One check. Attributes: result: what is known so far."""

    def __init__(self, scale: Scale, seconds: float, out: Path | None):
        self.scale, self.out = scale, out
        self._began, self._seconds = time.monotonic(), seconds
        self._until = seconds  # when the part that is being measured ends, counted from the beginning
        self.result: dict[str, Any] = {
            "tiny": scale is TINY,
            "minutes": seconds / 60,
            "missing": _missing(),
            "machine": {},
            "parts": {},
        }

    def run(self) -> None:
        for found in self._jobs([["machine", {}]], 1, self._seconds):
            self.result["machine"] = found.get("result", found)
        self._write()
        measures = {
            "correctness": self._correctness,
            "several GPUs": self._several_gpus,
            "restart": self._restart,
            "layer": self._layer,
        }
        spent = 0
        for part, share in SHARES.items():
            spent += share
            self._until = self._seconds * spent / sum(SHARES.values())
            entries = self.result["parts"][part] = []
            for entry in measures[part]() if part in measures else self._speeds(part, ORDER):
                entries.append(entry)
                self._write()
                print(_said(part, entry), file=sys.stderr, flush=True)

    # What each part measures: an iterator of its entries -----------------------------------------------------

    def _correctness(self) -> Iterator[dict]:
        if not TESTS.is_dir():
            yield {"name": "tests/cuda", "skipped": "the tests are in a checkout of the repository"}
            return
        if importlib.util.find_spec("pytest") is None:
            yield {"name": "tests/cuda", "skipped": "pytest is missing; pip install pytest"}
            return
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
        process = Process(command, "RELORA_DS_TEST_REPORT")
        yield from process.lines(self._left())
        if process.code not in (0, 1, None):
            yield {"name": "tests/cuda", "error": process.last_words}
        elif process.code is None:
            yield {"name": "the tests that are left", "skipped": OUT_OF_TIME}

    def _several_gpus(self) -> Iterator[dict]:
        gpus = self.result["machine"].get("gpus", 0)
        world_size = gpus or (2 if self.scale is TINY else 0)
        if world_size < 2:
            yield {"name": "all of it", "skipped": f"there are {gpus} GPUs"}
            return
        yield from self._speeds("speed at 350M", (FULL, "ours, dense"), world_size, stages=(1, 3))
        yield from self._restarts("speed at 350M", [("ours, dense", 1), ("ours, dense", 3)], world_size)

    def _restart(self) -> Iterator[dict]:
        for part in self.scale.presets:
            yield from self._restarts(part, [("ours, dense", 1), ("ours, nf4", 1), ("ours, dense", 3)], 1)

    def _layer(self) -> Iterator[dict]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for found in self._jobs([["layer", {"arguments": ["--device", device, *self.scale.layer]}]], 1, self._left()):
            yield {"name": "one layer", **found}

    def _speeds(
        self, part: str, variants: tuple[str, ...], world_size: int = 1, stages: tuple[int, ...] = (1,)
    ) -> Iterator[dict]:
        cases = [(name, self._spec(part, stage, **COMPARED[name])) for stage in stages for name in variants]
        for name, spec, found in self._cases(cases, "speed", world_size, repeats=self.scale.repeats):
            if "tokens_per_s" in found:
                found["mfu"] = self._mfu(found["flops_per_token"] * found["tokens_per_s"] / world_size)
            yield {"name": name, "micro_batch_size": spec.micro_batch_size, **found}

    def _restarts(self, part: str, variants: list[tuple[str, int]], world_size: int) -> Iterator[dict]:
        cases = [(f"restart: {variant}", self._spec(part, stage, variant=variant)) for variant, stage in variants]
        for name, _, found in self._cases(
            cases, "restart", world_size, tokens_per_step=self.scale.tokens_per_step, restarts=self.scale.restarts
        ):
            yield {"name": name, **found}

    def _cases(self, cases: list[tuple[str, Spec]], job: str, world_size: int, **arguments) -> Iterator[tuple]:
        """Name, Spec and what is found, of each case; those that this machine cannot run come first."""
        possible = []
        for name, spec in cases:
            if reason := _lacking(spec):
                yield name, spec, {**_setting(spec, world_size), "skipped": reason}
            else:
                possible.append((name, spec))
        jobs = [
            [job, {**arguments, "spec": vars(spec), **({"variant": name} if job == "speed" else {})}]
            for name, spec in possible
        ]
        for (name, spec), found in zip(possible, self._jobs(jobs, world_size, self._left()), strict=True):
            yield name, spec, {**_setting(spec, world_size), **found.pop("result", {}), **found}

    def _spec(self, part: str, stage: int, **changes) -> Spec:
        preset, micro_batch_size = self.scale.presets[part]
        return Spec(preset=preset, micro_batch_size=micro_batch_size, stage=stage, **self.scale.shape, **changes)

    def _mfu(self, flops: float) -> float | None:
        """Model FLOPs utilization: those a second that this variant needs / the card's most, where that is known."""
        peak = peak_flops(self.result["machine"].get("conditions", {}).get("device", ""))
        return flops / peak if peak else None

    # Processes ----------------------------------------------------------------------------------------------

    def _left(self) -> float:
        return self._until - (time.monotonic() - self._began)

    def _jobs(self, jobs: list, world_size: int, seconds: float) -> Iterator[dict]:
        """Yield what each job finds, in order: `result`, `error` or `skipped`. A job that fails ends its process."""
        until, done = time.monotonic() + seconds, 0
        while done < len(jobs) and time.monotonic() < until:
            with tempfile.NamedTemporaryFile("w", suffix=".json") as listed:
                json.dump(jobs[done:], listed)
                listed.flush()
                process, failed = Process(_on_ranks(world_size, "relora_ds.lab.bench.gpu_jobs", listed.name)), False
                with contextlib.closing(process.lines(until - time.monotonic())) as lines:
                    for found in lines:
                        done, failed = done + 1, "error" in found
                        yield found
                        if failed:  # every rank may say so
                            break
                if not failed and process.code is not None and done < len(jobs):  # it died without a word
                    done += 1
                    yield {"error": process.last_words}
        for _ in jobs[done:]:
            yield {"skipped": OUT_OF_TIME}

    def _write(self) -> None:
        if self.out is not None:
            from relora_ds.utils.files import write_json

            write_json(
                self.out,
                {
                    "bench": "gpu-check",
                    "conditions": self.result["machine"].get("conditions", {}),
                    "result": self.result,
                },
            )


def _setting(spec: Spec, world_size: int) -> dict:
    return {"preset": spec.preset, "stage": spec.stage, "world_size": world_size}


def _lacking(spec: Spec) -> str | None:
    """Return why this machine cannot run it: an optional library, a compiler."""
    if spec.is_peft and importlib.util.find_spec("peft") is None:
        return "peft is missing; pip install peft"
    if "nf4" in spec.variant and (reason := format_named("nf4").unavailable()):
        return f"nf4 {reason}"
    return next(iter(compilation.problems()), None) if spec.compile else None


def _on_ranks(world_size: int, module: str, *arguments: str) -> list[str]:
    if world_size == 1:
        return [sys.executable, "-m", module, *arguments]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(world_size),
        "-m",
        module,
        *arguments,
    ]


def _missing() -> dict[str, str]:
    """Return optional libraries that are not there: name -> what is therefore not measured."""
    unmeasured = {
        "bitsandbytes": "nf4",
        "peft": "PEFT's LoRA",
        "liger-kernel": "its kernels",
        "triton": "torch.compile",
    }
    return {name: what for name, what in unmeasured.items() if version_of(name) is None}


def _said(part: str, entry: dict) -> str:
    what = label(part, entry)
    if "error" in entry:
        return f"{what}: failed: {entry['error'].splitlines()[-1]}"
    if "skipped" in entry:
        return f"{what}: left out: {entry['skipped']}"
    return f"{what}: {entry['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in entry else what
