"""Read the small files of a run directory. A damaged one costs a warning and its contents, never the run."""

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def read_json(path: Path) -> dict:
    """Read a JSON object that a run can do without.

    Returns:
        {} where the file is missing and, with a warning, where it is damaged.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read (%s); its contents are ignored", path, error)
        return {}


def read_metrics(run_dir: Path) -> list[dict]:
    """Read all lines of a run's metrics.jsonl. Damaged ones are left out, with a warning.

    A last line that was cut off is left out without one: it may still be being written. A run that begins has none.
    """
    path = run_dir / METRICS
    try:
        return metrics_in(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error.strerror or error)
        return []


def metrics_in(path: Path) -> list[dict]:
    """Read the lines of a metrics file, as `read_metrics`. OSError where it cannot be read."""
    found, num_damaged = [], 0
    for raw in path.read_bytes().splitlines(keepends=True):
        if (line := line_in(raw)) is not None:
            found.append(line)
        else:
            num_damaged += bool(raw.strip()) and raw.endswith(b"\n")
    if num_damaged:
        logger.warning("%s: %d damaged lines are left out", path, num_damaged)
    return found


def line_in(raw: bytes) -> dict | None:
    """Return a line of a metrics file; None where it is damaged."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return {"phase": "", **line} if _is_line(line) else None


def _is_line(line: object) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("kind"), str)
        and isinstance(line.get("phase", ""), str)
        and isinstance(line.get("step"), int)
        and 0 <= line["step"] < 1 << 53
    )


def read_text(path: Path) -> str:
    """Read a text that a run can do without; "" where it is missing and, with a warning, where it is damaged."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s) and is left out", path, error)
        return ""
