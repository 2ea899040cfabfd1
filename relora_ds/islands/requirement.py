"""Ask for pyzmq before something imports it: it comes with an extra."""

from importlib.util import find_spec


def require_zmq() -> None:
    """Do nothing where pyzmq is installed.

    Raises:
        ValueError: it is not.
    """
    if find_spec("zmq") is None:
        raise ValueError("islands: they need pyzmq, which is not installed; pip install '.[islands]'")
