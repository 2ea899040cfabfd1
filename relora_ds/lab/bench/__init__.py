"""Measured comparisons: `relora bench NAME`. What is a claim elsewhere is a number here.

A benchmark is a module with `add_arguments(parser)`, `run(arguments) -> dict` that JSON can hold, and
`markdown(result) -> str`, the table of it.
"""

# name -> (its module in this package, what it measures). Each is imported only when it is asked for.
BENCHMARKS = {
    "layer": ("layer", "speed of one layer in every storage format, against full rank, naive LoRA and PEFT"),
    "requantization": (
        "requantization",
        "what is left of 20 merged updates in a quantized weight, with and without a master",
    ),
    "memory": ("peak_memory", "peak memory of a training step, by storage format and activation checkpointing"),
    "host-memory": (
        "host_memory",
        "host memory while an engine is built and at the end of the warm start, by number of ranks",
    ),
    "quality": ("quality", "validation loss by storage format: whole training runs on WikiText-2"),
    "checkpoint": ("checkpoint_cost", "bytes and seconds of a checkpoint, beside DeepSpeed's own of the same state"),
    "bandwidth": ("bandwidth", "bytes of a step by collective: full rank, PEFT LoRA and ours, at every ZeRO stage"),
    "two-hosts": ("two_hosts", "step time and tokens/s of two hosts, over a link of a given rate"),
    "islands": ("slow_links", "seconds and bytes of steps and exchanges over slow links: data parallel and islands"),
    "throughput": ("throughput", "tokens/s and the parts of a step: full rank, PEFT LoRA and ours, by micro-batch"),
    "restart": (
        "restart_time",
        "the pause of a restart, by network, ZeRO stage, storage format and place of the masters",
    ),
    "startup": ("startup", "seconds from the command to the first step, and where they go"),
    "trainer": ("trainer_overhead", "what metrics, guard and progress cost of a step, measured by leaving them out"),
    "clusters": ("clusters", "PREDICTED step time of full rank and ReLoRA on 8 to 4,096 GPUs, and across the internet"),
    "gpu-check": ("gpu_check", "correctness, speed, memory and restarts on this machine's GPU, within minutes"),
}
