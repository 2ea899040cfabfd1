"""When to give up."""


class GuardError(RuntimeError):
    """The run stops itself (exit code 3)."""


class NonFiniteGuard:
    """Counts non-finite steps in a row. No rank applied any of them; past `max_bad_steps` the run stops."""

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps = max_bad_steps
        self.in_a_row = 0
        self.total = 0

    def record(self, applied: bool) -> None:
        """Report a step. Raises GuardError after `max_bad_steps` bad ones in a row."""
        if applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.max_bad_steps:
            raise GuardError(f"guard.max_bad_steps: {self.in_a_row} steps in a row had a non-finite loss or gradient; "
                             "none was applied. Lower optim.lr, or look at the data of these steps")
