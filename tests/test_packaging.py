"""What `pip install .` brings: all code and data of relora_ds, the DeepSpeed configurations, and nothing else."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import relora_ds

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parent.parent
# Where the name of the module is not the name to install.
DISTRIBUTIONS = {"yaml": "pyyaml", "liger_kernel": "liger-kernel", "zmq": "pyzmq"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the checkout, built as pip builds it, but without a build environment to download."""
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "train.py"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("relora_ds", "ds_configs", "launch_scripts", "tests"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(output)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("*.whl")
    return path


def test_the_wheel_holds_relora_ds_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    kinds = (".py", ".yaml", ".json", ".typed")
    files = [path for path in (REPOSITORY / "relora_ds").rglob("*") if path.suffix in kinds]
    expected = {path.relative_to(REPOSITORY).as_posix() for path in files}
    expected |= {f"relora_ds/ds_configs/{path.name}" for path in (REPOSITORY / "ds_configs").iterdir()}
    assert {
        "relora_ds/recipes/quickstart.yaml",
        "relora_ds/models/presets.json",
        "relora_ds/zero/engine.py",
        "relora_ds/ds_configs/zero1.json",
        "relora_ds/py.typed",
    } <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("LICENSE") for name in names)


def test_the_installed_package_finds_its_data(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from relora_ds import config\n"
        "print(config.DS_CONFIG_DIR)\n"
        "print(*config.recipe_names())\nprint(*config.preset_names())\nprint(*config.ds_config_names())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    directory, recipes, presets, ds_configs = done.stdout.splitlines()
    assert Path(directory) == tmp_path / "relora_ds/ds_configs"
    assert "quickstart" in recipes.split() and "tiny" in presets.split() and "zero1" in ds_configs.split()


def test_version_and_requirements(wheel):
    metadata_file = f"relora_ds-{relora_ds.__version__}.dist-info/METADATA"
    metadata = message_from_string(zipfile.ZipFile(wheel).read(metadata_file).decode())
    assert metadata["Version"] == relora_ds.__version__ and metadata["Requires-Python"] == ">=3.10"
    required = metadata.get_all("Requires-Dist")
    assert any(line.startswith("deepspeed") and ">=0.19.8" in line and "<0.20" in line for line in required)
    assert metadata["License-Expression"] == "Apache-2.0" and "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_page_on_pypi_has_no_links_into_the_repository(wheel):
    metadata = zipfile.ZipFile(wheel).read(f"relora_ds-{relora_ds.__version__}.dist-info/METADATA").decode()
    assert "# relora_ds" in metadata
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata) == []


def test_the_command_is_relora(wheel):
    scripts = zipfile.ZipFile(wheel).read(f"relora_ds-{relora_ds.__version__}.dist-info/entry_points.txt").decode()
    assert "relora = relora_ds.__main__:main" in scripts


def test_what_is_imported_is_required():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    required = {Requirement(requirement).name for requirement in requirements}
    imported = set()
    for path in (REPOSITORY / "relora_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"relora_ds"}
    assert {DISTRIBUTIONS.get(name, name) for name in foreign} <= required


def imported_with(module: str) -> set[str]:
    """Return everything that is imported when a module of relora_ds is, by name, found without an import."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            place = REPOSITORY / name.replace(".", "/")
            files = [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
            waiting += [one for path in files for one in _imports(ast.parse(path.read_text(encoding="utf-8")).body)]
    return found


def _imports(statements: list[ast.stmt]) -> list[str]:
    """Return what statements import as they run; functions and what is for types alone do not."""
    found = []
    for node in statements:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.unparse(node).splitlines()[0]:
            found += _imports([*node.body, *node.orelse])
    return found


@pytest.mark.parametrize(
    "module", ["relora_ds.training.trainer", "relora_ds.planning.cost", "relora_ds.zero.initialize"]
)
def test_a_run_goes_without_extras(module):
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    distributions = {Requirement(one).name for name, extra in extras.items() if name != "test" for one in extra}
    modules = {name for name, distribution in DISTRIBUTIONS.items() if distribution in distributions} | distributions
    tops = {name.partition(".")[0] for name in imported_with(module)}
    assert "torch" in tops and "zmq" in modules
    assert not tops & modules
