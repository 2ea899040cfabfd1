"""How a run ends: exit codes of a rank, which launchers and schedulers rely on, and the exceptions behind them."""

DONE = 0
ERROR = 1  # anything that has no code of its own
RECIPE = 2  # the recipe cannot run
GUARD = 3  # the run stopped itself: a guard, or the watchdog
RESUME = 4  # the run may not resume, or may not use its run directory
PREEMPTED = 75  # asked to stop: it can be resumed; EX_TEMPFAIL of sysexits.h, so that schedulers start it again


class GuardError(RuntimeError):
    """The run stops itself (exit code GUARD)."""


class Preempted(RuntimeError):
    """The run stops because it was asked to (exit code PREEMPTED).

    Its state is saved; an island that waits for others has saved none, and resumes from an earlier checkpoint.
    """
