"""The tables of docs/quantization.md, from the measurements beside it: `python -m tests.bench.report` writes them.

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`, with NAME.json in docs/quantization/.
"""

import importlib
import json
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "quantization.md"
MEASUREMENTS = DOCUMENT.with_suffix("")
TABLE = re.compile(r"^<!-- (\w+) -->\n(.*?)^<!-- end of \1 -->$", re.MULTILINE | re.DOTALL)


def block(name: str) -> str:
    """The table of one measurement, and on what it was made."""
    record = json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
    module = importlib.import_module(f"relora_ds.bench.{record['bench']}")
    made = dict(record["conditions"])
    device, cores = made.pop("device"), made.pop("cores")
    made.pop("threads")  # of the process that collects; what measures has its own, in the table's first line
    versions = ", ".join(f"{library} {version}" for library, version in made.items())
    return f"\n{module.markdown(record['result'])}\n\n*{device}, {cores} cores; {versions}.*\n\n"


def filled(text: str) -> str:
    """The document with every table as it is measured."""
    return TABLE.sub(lambda found: f"<!-- {found[1]} -->\n{block(found[1])}<!-- end of {found[1]} -->", text)


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
