"""What makes the host wait for a GPU, counted by the place in the source that asked for it."""

import collections
import sys

_OBSERVED = ("relora_ds", "deepspeed", "transformers", "bitsandbytes")
_PASSED_ON = "/deepspeed/accelerator/"  # its functions only call torch.cuda's


class Syncs(collections.Counter):
    """`{(what, "package/file.py:function"): number}`; the place is the innermost one of the observed packages."""

    def note(self, what: str) -> None:
        """Count one."""
        self[what, _place()] += 1

    def places(self, package: str = "") -> dict[str, int]:
        """`{"file.py:function": number}` in one package."""
        found: collections.Counter[str] = collections.Counter()
        for (_, place), number in self.items():
            if place.startswith(package):
                found[place] += number
        return dict(found)


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for package in _OBSERVED:
            if f"/{package}/" in path and _PASSED_ON not in path:
                return f"{package}/{path.rsplit(f'/{package}/', 1)[1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
