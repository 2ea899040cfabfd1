"""The arrows between the packages of relora_ds point one way, and only relora_ds/zero knows DeepSpeed.

Imports are read with `ast`, also those inside functions and under TYPE_CHECKING; nothing is imported to check it.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# What each room may import of relora_ds, beside itself and `utils`. A room is a folder of relora_ds or one of its
# modules. The lab has rooms of its own.
BELOW_TRAINING = {
    "config",
    "architectures",
    "models",
    "data",
    "lowrank",
    "matrix",
    "zero",
    "checkpoint",
    "methods",
    "interop",
    "exchange",
    "remote",
}
ALLOWED = {
    "__init__": set(),  # the public names are imported lazily, by name
    "utils": set(),
    "islands": set(),
    "config": set(),
    "architectures": set(),
    "models": {"config", "architectures"},
    "data": {"config"},
    "lowrank": {"config"},
    "matrix": {"config", "lowrank"},
    "zero": {"config", "lowrank", "matrix", "checkpoint"},
    "checkpoint": {"config", "lowrank"},
    "methods": {"config", "architectures", "models", "lowrank", "matrix", "zero", "checkpoint"},
    "exchange": {"config", "lowrank", "zero", "islands"},
    "remote": {"config", "lowrank", "checkpoint"},
    "interop": {"config", "models", "data", "lowrank", "zero", "checkpoint", "exchange"},
    "training": BELOW_TRAINING,
    "train": BELOW_TRAINING | {"training"},
    "planning": BELOW_TRAINING | {"training"},
    "watch": {"config", "checkpoint"},
    "commands": BELOW_TRAINING | {"training", "planning", "islands", "watch"},
    "lab": set(),
    "lab.figures": {"config", "training"},
    "lab.bench": BELOW_TRAINING | {"training", "planning", "islands", "lab.figures"},
    "lab.experiments": BELOW_TRAINING | {"training", "train", "planning", "islands", "lab.bench", "lab.figures"},
    "lab.commands": {"config", "training", "train", "commands", "lab.bench", "lab.experiments", "lab.figures"},
    "__main__": {"config", "commands", "train", "lab.commands"},
}
# Other people's packages that a room may not import; "*" is every room that has no entry of its own.
FORBIDDEN = {
    "*": {"deepspeed"},
    "zero": set(),
    "utils": {"torch", "deepspeed", "transformers"},
    "islands": {"torch", "deepspeed", "transformers"},  # a server needs none of them
    "config": {"torch", "deepspeed", "transformers"},  # reading a recipe takes milliseconds
    "lowrank": {"deepspeed", "torch.distributed"},
    "matrix": {"deepspeed", "torch.distributed"},
}


def shared_names(root: Path) -> set[str]:
    """Return the names of modules of relora_ds that more than one file has.

    A command may be named after what it runs.
    """
    files = [path for path in (root / "relora_ds").rglob("*.py") if path.name != "__init__.py"]
    counts = Counter(path.name for path in files if path.parent.name != "commands")
    return {name for name, count in counts.items() if count > 1}


def violations(root: Path) -> list[str]:
    """What breaks the rules in the checkout `root`: `file:line: what`, for train.py and every module of relora_ds."""
    package = root / "relora_ds"
    known = {path.relative_to(package).parts[0].removesuffix(".py") for path in package.rglob("*.py")}
    found = []
    for path in sorted(package.rglob("*.py")):
        room = _room(path.relative_to(package).with_suffix("").parts)
        if room not in ALLOWED:
            found.append(f"{path.relative_to(root)}:1: no rule says what {room} may import")
            continue
        for line, name in _imports(path, root):
            if reason := _reason(room, name, known):
                found.append(f"{path.relative_to(root)}:{line}: {reason}")
    for line, name in _imports(root / "train.py", root):
        if name.split(".")[0] == "relora_ds" and not f"{name}.".startswith("relora_ds.train."):
            found.append(f"train.py:{line}: it imports {name}; relora_ds.train is all it needs")
    return found


def _room(parts: Sequence[str]) -> str:
    """Return the room of a module or of a name in it, given by its parts below `relora_ds`."""
    top, *rest = parts
    if top == "lab" and rest and rest[0] != "__init__":
        return f"lab.{rest[0]}"
    return top


def _reason(room: str, name: str, known: set[str]) -> str | None:
    """Why `room` may not import `name`, or None."""
    top, *rest = name.split(".")
    if top != "relora_ds":
        forbidden = FORBIDDEN.get(room, FORBIDDEN["*"])
        return next((f"{room} imports {name}" for ban in forbidden if f"{name}.".startswith(f"{ban}.")), None)
    if rest and rest[0] not in known:
        return None if rest[0] == "__version__" else f"{name} is a public name; import it from the module it is in"
    target = _room(rest) if rest else "__init__"
    return None if target in (room, "utils") or target in ALLOWED[room] else f"{room} imports {name}"


def _imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports; `from a import b` counts as `a.b`."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"  # `import torch` is enough to use it
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (
                (node.lineno, argument.value)
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def test_a_module_name_finds_one_file(tmp_path):
    assert shared_names(REPOSITORY) == set()
    for name in ("zero/engine.py", "data/engine.py", "commands/check.py", "data/check.py", "zero/__init__.py"):
        (tmp_path / "relora_ds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "relora_ds" / name).write_text("")
    assert shared_names(tmp_path) == {"engine.py"}


def test_the_arrows_point_one_way():
    assert violations(REPOSITORY) == []


def test_every_room_of_the_house_is_seen():
    rooms = BELOW_TRAINING | {"training", "islands"}
    assert rooms <= {_room([path.stem]) for path in (REPOSITORY / "relora_ds").iterdir()}


@pytest.mark.parametrize(
    ("file", "code", "violation"),
    [
        ("relora_ds/utils/files.py", "import torch", "utils imports torch"),
        ("relora_ds/utils/files.py", "from relora_ds import config", "utils imports relora_ds.config"),
        ("relora_ds/lowrank/linear.py", "import deepspeed", "lowrank imports deepspeed"),
        ("relora_ds/lowrank/linear.py", "import torch.distributed as dist", "lowrank imports torch.distributed"),
        ("relora_ds/lowrank/linear.py", "from torch import distributed", "lowrank imports torch.distributed"),
        (
            "relora_ds/lowrank/linear.py",
            "import torch\ntorch.distributed.barrier()",
            "lowrank imports torch.distributed",
        ),
        ("relora_ds/lowrank/linear.py", "from ..zero import engine", "lowrank imports relora_ds.zero.engine"),
        (
            "relora_ds/lowrank/linear.py",
            "import relora_ds.matrix.fira_update",
            "lowrank imports relora_ds.matrix.fira_update",
        ),
        (
            "relora_ds/matrix/fira_update.py",
            "from torch.distributed import reduce",
            "matrix imports torch.distributed.reduce",
        ),
        ("relora_ds/matrix/fira_update.py", "from ..zero import shards", "matrix imports relora_ds.zero.shards"),
        ("relora_ds/zero/engine.py", "from relora_ds import interop", "zero imports relora_ds.interop"),
        ("relora_ds/checkpoint/store.py", "from deepspeed.comm import comm", "checkpoint imports deepspeed.comm.comm"),
        (
            "relora_ds/checkpoint/store.py",
            "def f():\n  from relora_ds.methods import base",
            "checkpoint imports relora_ds.methods.base",
        ),
        (
            "relora_ds/methods/base.py",
            "from relora_ds.training.trainer import Trainer",
            "methods imports relora_ds.training.trainer.Trainer",
        ),
        ("relora_ds/training/trainer.py", "import deepspeed.comm", "training imports deepspeed.comm"),
        ("relora_ds/interop/hf_export.py", "import relora_ds.methods.base", "interop imports relora_ds.methods.base"),
        ("relora_ds/config/schema.py", "import torch", "config imports torch"),
        ("relora_ds/islands/server.py", "def f():\n  import torch", "islands imports torch"),
        (
            "relora_ds/config/merge.py",
            "import importlib\nimportlib.import_module('relora_ds.zero.engine')",
            "config imports relora_ds.zero.engine",
        ),
        (
            "relora_ds/data/loader.py",
            "from relora_ds.lowrank.linear import ReLoRALinear",
            "data imports relora_ds.lowrank.linear.ReLoRALinear",
        ),
        (
            "relora_ds/models/build.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import relora_ds.data.loader",
            "models imports relora_ds.data.loader",
        ),
        (
            "relora_ds/checkpoint/store.py",
            "from relora_ds import initialize",
            "relora_ds.initialize is a public name; import it from the module it is in",
        ),
        ("relora_ds/attic/old.py", "", "no rule says what attic may import"),
        (
            "relora_ds/training/trainer.py",
            "from relora_ds.lab.bench import peak_memory",
            "training imports relora_ds.lab.bench.peak_memory",
        ),
        (
            "relora_ds/lab/figures/run_figures.py",
            "import relora_ds.lab.bench.layer",
            "lab.figures imports relora_ds.lab.bench.layer",
        ),
        (
            "train.py",
            "from relora_ds.zero import engine",
            "it imports relora_ds.zero.engine; relora_ds.train is all it needs",
        ),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, code, violation):
    good = [
        "train.py",
        "relora_ds/__init__.py",
        "relora_ds/utils/files.py",
        "relora_ds/config/schema.py",
        "relora_ds/config/merge.py",
        "relora_ds/islands/server.py",
        "relora_ds/models/build.py",
        "relora_ds/data/loader.py",
        "relora_ds/lowrank/linear.py",
        "relora_ds/matrix/fira_update.py",
        "relora_ds/zero/engine.py",
        "relora_ds/checkpoint/store.py",
        "relora_ds/methods/base.py",
        "relora_ds/interop/hf_export.py",
        "relora_ds/training/trainer.py",
        "relora_ds/train.py",
        "relora_ds/lab/bench/layer.py",
        "relora_ds/lab/figures/run_figures.py",
    ]
    for name in [*good, file]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import math\n")
    assert violations(tmp_path) == [] or file not in good
    (tmp_path / file).write_text(code)
    (only,) = violations(tmp_path)
    assert only.startswith(f"{file}:") and only.endswith(f": {violation}")
