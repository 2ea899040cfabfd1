# shellcheck shell=bash
# Sourced by the launch scripts: finds a Python environment that can run this project, or makes one.
#
#   prepare_environment [EXTRA,...]     # sets PYTHON and puts its folder first in PATH
#
# An active environment (virtualenv, conda, or `python3`) that has torch and deepspeed is used; the
# requirements it lacks are added to it, and nothing that is installed there is replaced. Where something installed
# does not fit, or without such an environment, `.venv` in the checkout is made and used.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# examine PYTHON [EXTRA,...]: compare what is installed with pyproject.toml; one fact a line: `python PATH`,
# `using VERSIONS`, `missing REQUIREMENT`, `installed NAME==VERSION`. Where the environment cannot be used: exit code 1
# and the reason.
examine() {
    "$1" - "$ROOT/pyproject.toml" "${2:-}" <<'PYTHON'
import sys


def unusable(reason):
    print(reason)
    sys.exit(1)


if sys.version_info < (3, 10):
    unusable("it is Python %d.%d; 3.10 or newer is needed" % sys.version_info[:2])

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

sys.path = [folder for folder in sys.path if folder]  # a folder `torch` in the working directory is not PyTorch
for module in ("torch", "deepspeed"):
    if find_spec(module) is None:
        unusable(f"it has no {module}")

from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project_file, extras = sys.argv[1:]
with open(project_file, "rb") as file:
    project = tomllib.load(file)["project"]
optional = project["optional-dependencies"]
requirements = project["dependencies"] + [one for extra in extras.split(",") if extra for one in optional[extra]]
facts = [f"python {sys.executable}", f"using torch {version('torch')}, deepspeed {version('deepspeed')}"]
for text in requirements:
    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate():
        continue
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        facts.append(f"missing {text}")
        continue
    if not requirement.specifier.contains(found, prereleases=True):
        unusable(f"it has {requirement.name} {found}; {text} is needed")
    facts.append(f"installed {requirement.name}=={found}")
print(*facts, sep="\n")
PYTHON
}

# facts KIND: the lines of that kind from stdin, without the word.
facts() { sed -n "s/^$1 //p"; }

# use_active [EXTRA,...]: set PYTHON to the active environment's, complete it; or leave the reason in `unused`.
use_active() {
    local candidate=python3 found missing=() line pins
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        candidate=$VIRTUAL_ENV/bin/python
    elif [ -n "${CONDA_PREFIX:-}" ]; then
        candidate=$CONDA_PREFIX/bin/python
    fi
    unused="there is no active environment"
    if [ "${VIRTUAL_ENV:-}" = "$VENV" ] || ! command -v "$candidate" >/dev/null; then
        return 1
    fi
    if ! found=$(examine "$candidate" "${1:-}" 2>/dev/null); then
        unused="not $candidate: ${found:-it could not be examined}"
        return 1
    fi
    while IFS= read -r line; do
        missing+=("$line")
    done < <(facts missing <<<"$found")
    PYTHON=$(facts python <<<"$found")
    if [ "${#missing[@]}" -gt 0 ]; then
        say "adding to the active environment: ${missing[*]}"
        pins=$(mktemp)
        facts installed <<<"$found" >"$pins"
        "$PYTHON" -m pip install -qq -c "$pins" "${missing[@]}" ||
            fail "$PYTHON -m pip could not add them. Add them yourself, or deactivate the environment to have .venv made."
        rm -f "$pins"
    fi
    say "environment: $PYTHON ($(facts using <<<"$found"))"
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "Python 3.10 or newer is needed, and none is in PATH"
}

make_venv() {
    local base
    base=$(find_python) || exit 1
    say "making .venv with $("$base" --version)"
    if "$base" -c 'import ensurepip' 2>/dev/null; then
        "$base" -m venv --clear "$VENV"
    else  # Debian keeps ensurepip in a package of its own
        "$base" -m venv --clear --without-pip "$VENV" && "$base" -m pip --python "$VENV/bin/python" install -qq pip
    fi || fail "$base could not make $VENV; on Debian and Ubuntu: apt install python3-venv"
}

# pip_is_set_up: whether the user's settings, of the environment or of pip's files, say what pip may install.
pip_is_set_up() {
    local settings="\.(index-url|extra-index-url|no-index|find-links|constraint)='[^']"
    [[ $("$PYTHON" -m pip config list 2>/dev/null) =~ $settings ]]
}

# choose_build: announce the download, and set `build` to the options by which pip finds PyTorch's CPU build: on a
# machine without an NVIDIA GPU, if the user has not set pip up and the index of that build answers.
choose_build() {
    build=()
    say "installing PyTorch, DeepSpeed, transformers and the rest into .venv; this takes minutes"
    if [ "$(uname -sm)" != "Linux x86_64" ]; then return; fi
    if pip_is_set_up; then
        say "  pip's settings decide which PyTorch: 3 to 6 GB with its CUDA libraries, 0.2 GB without"
    elif command -v nvidia-smi >/dev/null; then
        say "  3 to 6 GB: PyTorch for Linux brings its CUDA libraries"
    elif timeout 10 "$PYTHON" -m pip index versions torch --index-url "$CPU_INDEX" --retries 0 --timeout 4 \
        >/dev/null 2>&1; then
        build=(--extra-index-url "$CPU_INDEX")
        say "  no NVIDIA GPU was found: PyTorch's CPU build from $CPU_INDEX, 0.2 GB instead of 3 to 6"
        say "  To use .venv on machines with GPUs, stop now and start with PIP_INDEX_URL=https://pypi.org/simple in the"
        say "  environment."
    else
        say "  3 to 6 GB: PyTorch for Linux brings its CUDA libraries. No NVIDIA GPU was found, but $CPU_INDEX,"
        say "  which has a CPU build of 0.2 GB, does not answer."
    fi
}

# use_venv: set PYTHON to .venv's, making and completing it where pyproject.toml has changed since it was last completed.
use_venv() {
    local stamp pins build=()
    stamp="$(cksum <"$ROOT/pyproject.toml") $ROOT"
    PYTHON=$VENV/bin/python
    "$PYTHON" -c '' 2>/dev/null || make_venv
    if [ "$(cat "$VENV/relora_ds.stamp" 2>/dev/null)" != "$stamp" ]; then
        pins=$(mktemp)
        "$PYTHON" -m pip list --format=freeze 2>/dev/null | grep -i '^torch==' >"$pins" || choose_build
        "$PYTHON" -m pip install -qq -c "$pins" ${build[@]+"${build[@]}"} -e "${ROOT}[test]" ||
            fail "pip could not complete .venv; what it says is above. Run this again to continue."
        rm -f "$pins"
        printf '%s\n' "$stamp" >"$VENV/relora_ds.stamp"
    fi
    export VIRTUAL_ENV=$VENV
    say "environment: .venv ($unused)"
    if command -v nvidia-smi >/dev/null && [[ $("$PYTHON" -m pip freeze 2>/dev/null) =~ torch==[^[:space:]]*\+cpu ]]; then
        say "warning: .venv has PyTorch's CPU build, and this machine has an NVIDIA GPU; remove .venv to have it made again"
    fi
}

prepare_environment() {
    local unused
    use_active "${1:-}" || use_venv
    PATH=$(dirname "$PYTHON"):$PATH  # DeepSpeed looks for ninja there
    export PATH
}
