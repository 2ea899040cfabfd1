"""Hooks: what happens beside training. `hook.Hook` has the events; the others are the trainer's own."""

from relora_ds.training.hooks.hook import Hook

__all__ = ["Hook"]
