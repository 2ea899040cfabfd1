"""Attributes replaced for a while."""

import contextlib
import functools
from collections.abc import Callable

_MISSING = object()


class Patches(contextlib.ExitStack):
    """Replaces attributes, and puts back what was there when it is closed."""

    def set(self, owner, **values) -> None:
        """Give `owner` (a module or class) other attributes."""
        for name, value in values.items():
            old = vars(owner).get(name, _MISSING)
            setattr(owner, name, value)
            self.callback(*((delattr, owner, name) if old is _MISSING else (setattr, owner, name, old)))

    def wrap(self, owner, handlers: dict[str, Callable]) -> None:
        """Replace functions of `owner` by `handler(function, *arguments, **keywords)`, by name."""
        self.set(owner, **{name: _handled(getattr(owner, name), handler) for name, handler in handlers.items()})


def _handled(function: Callable, handler: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        return handler(function, *args, **kwargs)

    return call
