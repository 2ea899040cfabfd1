"""Data: corpora, tokenizer, memory-mapped token caches, the resumable loader.

The way through the package: `problems` checks the settings, `prepare` tokenizes the corpus once per host, and
`TrainLoader`, of which `Prefetched` is a step ahead, and `evaluation_batches` read the result. Nothing here knows about
DeepSpeed or about training.
"""

from relora_ds.data.checks import problems
from relora_ds.data.corpora import documents
from relora_ds.data.loader import TrainLoader, evaluation_batches
from relora_ds.data.mixture import prepare
from relora_ds.data.prefetch import Prefetched
from relora_ds.data.preparation import PreparedData

__all__ = ["Prefetched", "PreparedData", "TrainLoader", "documents", "evaluation_batches", "prepare", "problems"]
