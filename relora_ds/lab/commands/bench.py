"""`python -m relora_ds bench NAME`."""

import argparse
import importlib
import json
import os
import signal
import sys
from pathlib import Path

MAY_BE_ZERO = {"stage", "stages", "node_rank", "seed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from relora_ds.lab.bench import BENCHMARKS

    subparsers = parser.add_subparsers(dest="bench", required=True, metavar="name", parser_class=BenchmarkParser)
    for name, (_, what) in BENCHMARKS.items():
        subparsers.add_parser(name, help=what, description=what)
    # argparse cannot intermix where there are subcommands.
    parser.parse_intermixed_args = parser.parse_args  # type: ignore[method-assign]


class BenchmarkParser(argparse.ArgumentParser):
    """The options of one benchmark, whose module (it imports torch and deepspeed) is imported when they are parsed."""

    def complete(self) -> None:
        """Import the benchmark's module and add its options."""
        from relora_ds.lab.bench import BENCHMARKS

        module = importlib.import_module(f"relora_ds.lab.bench.{BENCHMARKS[self.prog.split()[-1]][0]}")
        module.add_arguments(self)
        self.add_argument("--out", type=Path, metavar="FILE.json", help="write the result, with its conditions")
        self.set_defaults(module=module)

    def parse_known_args(self, args=None, namespace=None):
        self.complete()
        return super().parse_known_args(args, namespace)


def run(arguments: argparse.Namespace) -> int:
    from relora_ds.lab.bench.environment import environment_info

    if arguments.out and not arguments.out.parent.is_dir():  # known before hours of measuring
        raise ValueError(f"--out: there is no directory {arguments.out.parent}; make it first")
    _require_counts(arguments)
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, and what was made removed
    result = arguments.module.run(arguments)
    if os.environ.get("RANK", "0") != "0":  # one of several ranks that a launcher has started
        return 0
    record = {"bench": arguments.bench, "conditions": environment_info(), "result": result}
    print(arguments.module.markdown(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return arguments.module.exit_code(result) if hasattr(arguments.module, "exit_code") else 0


def _require_counts(arguments: argparse.Namespace) -> None:
    """Whole numbers count something: repeats, ranks, tokens. ValueError: one is below 1."""
    for name, value in vars(arguments).items():
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number < 1 and name not in MAY_BE_ZERO:
                raise ValueError(f"--{name.replace('_', '-')}: {number} is not possible; give 1 or more")
