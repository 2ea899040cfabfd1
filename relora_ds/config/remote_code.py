"""What to say where a directory comes with Python code of its own, which `trust_remote_code` alone allows to run.

transformers asks on stdin where it is told neither yes nor no, so every call that can load such code passes the value
of the recipe (or of `--trust-remote-code`), never nothing.
"""


class UntrustedCode(ValueError):
    """A model or a tokenizer would have to run code that comes with it, and is not trusted."""

    def __init__(self, name: str):
        super().__init__(
            f"{name} comes with Python code of its own, which is not run; read it, and if you trust it "
            "use trust_remote_code=true in the recipe, or the option --trust-remote-code of the command"
        )


def is_refusal(error: BaseException | None) -> bool:
    """Return True if `error` is transformers' refusal to run code that was not trusted."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)
