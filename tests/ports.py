"""Ports for processes that a test starts."""

from relora_ds.utils.ports import free_port

__all__ = ["free_port"]
