"""What a machine needs to run an island."""

from relora_ds.config import IslandsConfig
from relora_ds.islands.address import endpoint
from relora_ds.islands.requirement import require_zmq
from relora_ds.islands.secret import read_secret


def machine_problems(islands: IslandsConfig) -> list[str]:
    """Return what is missing here: pyzmq, the secret, or an address that is one."""
    if islands.count is None:
        return []
    found = []
    for check in (require_zmq, read_secret, lambda: endpoint(str(islands.address), "islands.address")):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    return found
