"""Training across a real link: step time, tokens per second and the bytes that the kernel sent, by variant and rate.

Without --hostfile two network namespaces of this machine are the hosts, joined by a link whose rate `tc` limits, and a
genuine multi-node start runs across it: `deepspeed --hostfile ... --no_ssh`, a launcher in each. With --hostfile and
--node_rank the same is measured between machines, at the rate that their network has; start it on each of them.

    compute         forward and backward, with a clock that stands still in collectives
    communication   in collectives, waiting for the slower host included. Each is waited for: what would run beside
                    compute, at stage 3 on GPUs, does not here
    alone           compute and optimizer of a rank that talks to nobody, on both hosts at the same time (from stage 1
                    on half of that optimizer: of two ranks each steps a half)
    predicted       alone + what `planning.cluster` says of the collectives that were counted, at the bandwidth and
                    latency that `planning.link` measured across this link
    at full rate    alone + wire bytes / rate: nothing that sends so much is faster
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.lab.bench.baselines import FULL, TWINS, VARIANTS, Spec, build, require, step, synchronized
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.simulated_link import ADDRESSES, INTERFACE, SimulatedLink, parse_rate
from relora_ds.planning import link
from relora_ds.planning.cluster import Cluster, Wire
from relora_ds.zero.launchers import hosts_in

DEFAULT_VARIANTS = (FULL, "PEFT, its default", "PEFT, same modules train", "ours, LoRA alone", "ours, dense")
SHAPES = ("llama_60m", "wide_4")
PARTS = ("compute", "optimizer", "communication")  # of a step
_PORT = 29_517
_LINK_SECONDS = 10  # that are taken to measure the link


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rate", default="10gbit,1gbit,100mbit", help="of the link (default: %(default)s)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(SHAPES),
        metavar="SHAPE",
        help="presets; wide_2 and wide_4, layers of width 2048; medium_4, of width 1024 (default: llama_60m wide_4)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(DEFAULT_VARIANTS),
        metavar="NAME",
        help=f"of {', '.join(map(repr, VARIANTS))} (default: those without a storage format)",
    )
    parser.add_argument("--r", type=int, default=64, help="rank of the updates (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="tokens of the vocabulary (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch-size", type=int, default=1, metavar="N", help="sequences of a forward (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-len", type=int, default=64, metavar="N", help="tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument("--stage", type=int, choices=range(4), default=1, help="of ZeRO (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the run (default: %(default)s: CPUs without units for bf16 would compute full rank slowly)",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="medians are of so many steps (default: %(default)s)"
    )
    parser.add_argument("--hostfile", type=Path, help="two machines, a line each: ADDRESS slots=RANKS")
    parser.add_argument("--node_rank", type=int, default=0, help="with --hostfile: which of them this one is")


def run(arguments: argparse.Namespace) -> dict:
    """Measure every variant alone, then at every rate.

    Raises:
        ValueError: no root or no iproute2, and no hostfile; or a rank failed.
    """
    rates = [parse_rate(text) for text in arguments.rate.split(",")] if arguments.hostfile is None else [None]
    shared = {
        name: getattr(arguments, name)
        for name in (
            "r",
            "vocab_size",
            "micro_batch_size",
            "seq_len",
            "stage",
            "precision",
            "repeats",
            "shapes",
            "variants",
        )
    }
    require(spec for shape in arguments.shapes for spec in _specs(shared, shape))
    joined = SimulatedLink() if arguments.hostfile is None else nullcontext()
    with joined as link, tempfile.TemporaryDirectory() as scratch:
        place = _Place(link, arguments.hostfile, arguments.node_rank, Path(scratch))
        print("alone", file=sys.stderr, flush=True)
        alone = place.run(shared, together=False)
        rows = []
        for rate in rates:
            if link is not None and rate is not None:
                link.limit(rate)
                print(_rate(rate), file=sys.stderr, flush=True)
            for one, row in zip(alone, place.run(shared, together=True), strict=True):
                rows.append(
                    {**row, "rate": rate, "alone_compute_s": one["compute_s"], "alone_optimizer_s": one["optimizer_s"]}
                )
    return {**shared, "rows": rows}


def with_predictions(result: dict) -> dict:
    """Return the result with a prediction for every row, and the shortest step that a known rate allows."""
    return {**result, "rows": [{**row, **_predicted(row, result["stage"])} for row in result["rows"]]}


def _predicted(row: dict, stage: int) -> dict[str, float | None]:
    alone = row["alone_compute_s"] + row["alone_optimizer_s"] / (2 if stage else 1)
    wire = Wire(row["bandwidth"], row["latency_s"])
    joined = Cluster(2, 1, inside=wire, between=wire)
    return {
        "predicted_s": alone + joined.communication(row["wire"], row["passes"]),
        "at_full_rate_s": alone + row["wire"] * 8 / row["rate"] if row["rate"] else None,
    }


class _Place:
    """Where the ranks are started: in the two namespaces of a link, or on this host of a hostfile."""

    def __init__(self, link: SimulatedLink | None, hostfile: Path | None, node_rank: int, scratch: Path):
        self._link, self._node_rank, self._scratch = link, node_rank, scratch
        self._hostfile = hostfile or scratch / "hostfile"
        if hostfile is None:
            self._hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        hosts = hosts_in(self._hostfile)
        if len(hosts) != 2 or node_rank not in (0, 1):
            raise ValueError(
                f"--hostfile, --node_rank: two machines are compared, of {len(hosts)} in {self._hostfile} "
                f"this would be number {node_rank}; give a line for each of two, and 0 or 1"
            )
        self._master = hosts[0]

    def run(self, shared: dict, together: bool) -> list[dict]:
        """Return the rows of the ranks: as two hosts that train together, or each by itself at the same time.

        Of a hostfile the first host has the rows; [] on the other one.
        """
        out = self._scratch / "rows.jsonl"
        out.unlink(missing_ok=True)
        here = range(2) if self._link is not None else [self._node_rank]
        started = [self._start(node, shared, together, out) for node in here]
        try:
            shown = 0
            while any(process.poll() is None for process in started):
                if any(process.poll() for process in started):
                    break  # the other one would wait for it
                time.sleep(0.1)
                rows = _rows(out)
                for row in rows[shown:]:
                    print(f"  {row['shape']}, {row['variant']}: {row['step_s']:.2f} s", file=sys.stderr, flush=True)
                shown = len(rows)
        finally:
            for process in started:
                process.terminate()
                process.wait()
        if any(process.returncode for process in started) or (0 in here and not _rows(out)):
            said = [self._log(node).read_text(encoding="utf-8", errors="replace")[-2000:] for node in here]
            raise ValueError("two-hosts: a rank failed:\n" + "\n".join(said))
        return _rows(out)

    def _log(self, node: int) -> Path:
        return self._scratch / f"host{node}.log"

    def _start(self, node: int, shared: dict, together: bool, out: Path) -> subprocess.Popen:
        worker = [__name__, json.dumps(shared), str(out if node == 0 else os.devnull)]
        environment = (
            {"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": INTERFACE}
            if self._link
            else {"OMP_NUM_THREADS": "1", **os.environ}
        )
        if together:
            command = [
                sys.executable,
                "-m",
                "deepspeed.launcher.runner",
                "--quiet",
                "--hostfile",
                str(self._hostfile),
                "--no_ssh",
                "--node_rank",
                str(node),
                "--master_addr",
                self._master,
                "--master_port",
                str(_PORT),
                "--module",
                *worker,
            ]
        else:
            command = [sys.executable, "-m", *worker]
            environment.pop("GLOO_SOCKET_IFNAME", None)
        if self._link is not None:
            command = ["ip", "netns", "exec", self._link.hosts[node], *command]
            environment["CUDA_VISIBLE_DEVICES"] = ""  # both hosts would have the same GPU
        with self._log(node).open("w") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )


def _rows(path: Path) -> list[dict]:
    """Those that are whole: the last one may still be written."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def measure(shared: dict) -> Iterator[dict]:
    """Return a row for every variant on every shape. Collective.

    PEFT and ours take their steps in turns where they train the same. Full rank stays alone: in one memory with it, the
    others' steps change by half from one to the next.
    """
    joined = {}
    if dist.get_world_size() > 1:
        found = link.measure(_LINK_SECONDS, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        joined = {"bandwidth": found.wire_per_second(shared["stage"]), "latency_s": found.latency / 2}
    for shape in shared["shapes"]:
        groups: dict[str, list[Spec]] = {}
        for spec in _specs(shared, shape):
            groups.setdefault(TWINS.get(spec.variant, spec.variant), []).append(spec)
        for specs in groups.values():
            variants = [_TimedVariant(spec) for spec in specs]
            for number in range(2, 2 + shared["repeats"]):
                for variant in variants:
                    variant.timed_step(number)
            for variant in variants:
                yield {"shape": shape, "variant": variant.spec.variant, **variant.row(), **joined}


def _specs(shared: dict, shape: str) -> list[Spec]:
    same = {name: shared[name] for name in ("r", "vocab_size", "micro_batch_size", "seq_len", "precision", "stage")}
    return [Spec(variant, shape, **same) for variant in shared["variants"]]


class _TimedVariant:
    """An engine whose steps are timed."""

    def __init__(self, spec: Spec):
        from relora_ds.zero.traffic import count_traffic

        self.spec, self._engine = spec, build(spec)
        self._steps: list[tuple[float, ...]] = []  # of the step, and of PARTS
        self._sent: list[int] = []
        step(self._engine, spec, 0)
        with count_traffic() as self._traffic:
            step(self._engine, spec, 1)

    def timed_step(self, number: int) -> None:
        from relora_ds.zero.traffic import time_collectives

        dist.barrier()
        before, started = _sent_bytes(), time.perf_counter()
        with time_collectives() as spent:
            taken = step(self._engine, self.spec, number, lambda: synchronized() - sum(spent().values()))
            self._steps.append(
                (time.perf_counter() - started, taken.forward + taken.backward, taken.optimizer, sum(spent().values()))
            )
        dist.barrier()
        self._sent.append(_sent_bytes() - before)

    def row(self) -> dict:
        """Medians, of the slower rank each. Releases the engine."""
        from relora_ds.zero.teardown import release

        slowest = torch.tensor(self._steps, dtype=torch.float64, device=self._engine.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        release(self._engine)
        seconds, *parts = zip(*slowest.tolist(), strict=True)
        tokens = self.spec.micro_batch_size * self.spec.seq_len * dist.get_world_size()
        return {
            "steps_s": seconds,
            "step_s": statistics.median(seconds),
            **{f"{part}_s": statistics.median(values) for part, values in zip(PARTS, parts, strict=True)},
            "tokens_per_s": tokens / statistics.median(seconds),
            "wire": self._traffic.wire,
            "passes": sum(2 if name == "all_reduce" else 1 for name, _ in self._traffic.calls),
            "kernel_tx_bytes": statistics.median(self._sent),
        }


def _sent_bytes() -> int:
    """Return the bytes that this host has sent over the link, headers included; 0 where there is no such link."""
    path = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
    return int(path.read_text()) if path.is_file() else 0


def markdown(result: dict) -> str:
    """Two tables: where the seconds go, and what became of the bytes that are not sent."""
    shown = with_predictions(result)["rows"]
    full = {(row["shape"], row["rate"]): row for row in shown if row["variant"] == FULL}
    return (
        f"vocabulary {result['vocab_size']:,}, r {result['r']}, {result['micro_batch_size']} x {result['seq_len']} "
        f"tokens on each of two hosts, {result['precision']}, ZeRO-{result['stage']}, medians of "
        f"{result['repeats']}\n\n{rows_as_markdown(_seconds(shown))}"
        f"\n\n{rows_as_markdown(_gains(shown, full))}"
    )


def _seconds(shown: list[dict]) -> list[list[str]]:
    rows = [
        ["shape", "link", "variant", *PARTS, "step", "predicted", "at full rate", "tokens/s", "wire", "kernel sent"]
    ]
    for row in shown:
        rate, sent = row["rate"], row["kernel_tx_bytes"]
        rows.append(
            [
                row["shape"],
                _rate(rate),
                row["variant"],
                *(f"{row[f'{part}_s']:.2f} s" for part in (*PARTS, "step", "predicted")),
                f"{row['at_full_rate_s']:.2f} s" if rate else "",
                f"{row['tokens_per_s']:.0f}",
                f"{row['wire'] / 1e6:.1f} MB",
                f"{sent / row['wire'] - 1:+.1%}" if sent else "",
            ]
        )
    return rows


def _gains(shown: list[dict], full: dict[tuple, dict]) -> list[list[str]]:
    """Return full rank's bytes, communication and step over this one's; the last beside its upper bound."""
    rows = [["shape", "link", "variant", "bytes", "communication", "of bytes", "step", "step at full rate", "of that"]]
    for row in shown:
        base = full.get((row["shape"], row["rate"]))
        if row["variant"] == FULL or base is None:
            continue
        fewer, shorter, faster = (base[part] / row[part] for part in ("wire", "communication_s", "step_s"))
        allowed = base["at_full_rate_s"] / row["at_full_rate_s"] if row["rate"] else None
        rows.append(
            [
                row["shape"],
                _rate(row["rate"]),
                row["variant"],
                f"{fewer:.2f}x",
                f"{shorter:.2f}x",
                f"{shorter / fewer:.2f}",
                f"{faster:.2f}x",
                *([f"{allowed:.2f}x", f"{faster / allowed:.2f}"] if allowed else ["", ""]),
            ]
        )
    return rows


def _rate(rate: float | None) -> str:
    return "as it is" if rate is None else f"{rate / 1e6:.0f} Mbit/s"


def _worker(argv: list[str]) -> None:
    from relora_ds.training.terminal import quieten_libraries
    from relora_ds.zero.start import init_distributed

    shared, out = [argument for argument in argv if not argument.startswith("--local_rank")]
    quieten_libraries()
    init_distributed()
    with open(out, "a", encoding="utf-8") as file:
        for row in measure(json.loads(shared)):
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    _worker(sys.argv[1:])
