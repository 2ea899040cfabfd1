"""Measured comparisons: `python -m relora_ds bench <name>`. What is a claim elsewhere is a number here.

A benchmark is a module with NAME and HELP, `add_arguments(parser)`, `run(arguments) -> dict` that JSON can hold, and
`markdown(result) -> str`, the table of it.
"""

# Modules of this package; each is imported only when it is asked for.
BENCHMARKS = (
    "layer",
    "requantization",
    "memory",
    "host_memory",
    "quality",
    "checkpoint",
    "bandwidth",
    "two_hosts",
    "throughput",
    "restart",
    "startup",
    "trainer",
    "clusters",
    "gpu_check",
)
