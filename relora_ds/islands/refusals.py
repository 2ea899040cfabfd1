"""The ways in which a call of the link ends without an answer."""


class LinkRefused(ValueError):
    """Say why the server, or this side for it, refuses what was asked; the same again would be refused again."""


class Stopped(RuntimeError):
    """Say that this rank is asked to stop, and waits no longer for the server."""


class LinkError(ConnectionError):
    """Say that the server has been silent for too long; it may answer later."""
