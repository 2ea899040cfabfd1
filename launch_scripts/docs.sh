#!/usr/bin/env bash
# Build the documentation: bash launch_scripts/docs.sh [--serve]
#
# Writes site/: static pages, whose search needs a web server. A broken link or a page without a place in mkdocs.yml is
# an error. --serve shows the site at http://127.0.0.1:8000 and follows changes. The environment gets mkdocs if it lacks
# it.
set -euo pipefail
# shellcheck source=launch_scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ $# -gt 1 ] || [[ ${1:---serve} != --serve ]]; then
    echo "usage: bash launch_scripts/docs.sh [--serve]" >&2
    exit 2
fi
prepare_environment docs
cd "$ROOT"
export NO_MKDOCS_2_WARNING=1  # the requirements stay below mkdocs 2
if [ $# -eq 1 ]; then exec "$PYTHON" -m mkdocs serve; fi
exec "$PYTHON" -m mkdocs build --strict
