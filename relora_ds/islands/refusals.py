"""The errors of the link."""


class LinkRefused(ValueError):
    """Say why the server, or this side for it, refuses what was asked; the same again would be refused again."""


class LinkError(ConnectionError):
    """Say that the server has been silent for too long; it may answer later."""
