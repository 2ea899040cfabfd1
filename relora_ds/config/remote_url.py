"""What is wrong with the URL of an object store, as far as its text tells."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from relora_ds.config.schema import CheckpointConfig

_EXAMPLE = "use e.g. s3://bucket/runs/mine"


def problems(checkpoint: CheckpointConfig) -> Iterator[str]:
    """Yield why `checkpoint.remote` names no directory of a store, or must not stand in a recipe."""
    url = checkpoint.remote
    if url is None:
        return
    protocol, has_protocol, path = url.partition("://")
    if not (protocol and has_protocol):
        yield f"checkpoint.remote: {url} is no URL; {_EXAMPLE}"
    elif not path.strip("/"):
        yield f"checkpoint.remote: {url} names no bucket or directory; {_EXAMPLE}"
    elif _has_secret(url):
        yield (
            f"checkpoint.remote: the URL of {protocol}:// holds a key or a password, which recipe.yaml and every "
            "checkpoint would keep; put it into the environment of the protocol"
        )


def _has_secret(url: str) -> bool:
    try:
        return urlsplit(url).password is not None
    except ValueError:  # no URL to urllib: what fsspec makes of it is seen later
        return False
