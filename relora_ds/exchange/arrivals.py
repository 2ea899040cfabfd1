"""What comes over the link at an exchange: the server's decision, and the updates of the other islands.

All ranks of an island talk to the server together: where it fails one of them, all raise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.exchange.compress import unpack
from relora_ds.islands.answers import Decision
from relora_ds.islands.refusals import LinkError, LinkRefused, Stopped
from relora_ds.zero.together import together

if TYPE_CHECKING:
    from relora_ds.islands.client import Link


@dataclass(frozen=True)
class Arrived:
    """What an island in a decision has sent to this rank.

    Attributes:
        weight: its part of the mean.
        rho: what weight decay has left of its frozen weights.
        blobs: by name.
    """

    weight: float
    rho: float
    blobs: Mapping[str, Any]

    def bytes_of(self, name: str) -> Tensor:
        """Return what was sent, 1-D uint8 on the CPU; it can be read only."""
        return torch.frombuffer(self.blobs[name], dtype=torch.uint8)

    def tensor(self, name: str, shape: torch.Size, device: torch.device, compression: str = "none") -> Tensor:
        """Return a new fp32 tensor of what was sent with this compression."""
        return unpack(self.bytes_of(name), shape, compression).to(device, copy=True)


def linked(talk: Callable[[], object]) -> None:
    """Have every rank talk to the server. Collective: `talk` is not.

    Raises:
        LinkRefused: on every rank, where the server refuses one of them. LinkError: it is silent. Stopped: one of them
            was asked to stop while it waited.
    """
    together("islands", talk, LinkRefused, LinkError, Stopped)


def decision_of(link: "Link", round: int) -> Decision:
    """Wait for the decision of a round. Collective.

    Raises:
        Stopped: there is none, and a rank is asked to stop.
    """
    found: list[Decision | None] = [None]

    def ask() -> None:
        found[0] = link.decision(round)

    while True:
        linked(ask)
        said: list = [None] * dist.get_world_size()
        dist.all_gather_object(said, (found[0] is None, link.is_asked_to_stop))
        if found[0] is not None and not any(is_pending for is_pending, _ in said):
            return found[0]
        if any(is_asked for _, is_asked in said):
            raise Stopped(f"asked to stop while exchange {round} waited for other islands")


def updates_of(
    link: "Link", decision: Decision, sizes: Mapping[str, int], own: Mapping[str, Any], incarnation: str
) -> list[Arrived]:
    """Receive what the islands in a decision have sent to this rank, in the order of their names. Collective.

    Args:
        sizes: bytes of each blob.
        own: this island's, {} without: they are not received again where they are those that were decided on.
        incarnation: of this island.
    """
    total = sum(facts["samples"] for facts in decision.islands.values())
    arrived: list[Arrived] = []

    def receive() -> None:
        for island, facts in decision.islands.items():
            is_own = bool(own) and facts["incarnation"] == incarnation
            blobs = own if is_own else link.fetch(decision.round, island, list(sizes), sizes)
            arrived.append(Arrived(facts["samples"] / total, facts["rho"], blobs))

    linked(receive)
    return arrived
