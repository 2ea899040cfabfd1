"""What is told of an exchange."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExchangeReport:
    """An exchange, the same on every rank of an island.

    Attributes:
        round: its number, from 1.
        islands: the names of those in it.
        missing: of those that it lacks.
        bytes_sent, bytes_received: of this island's ranks together.
        exchange_s: seconds, from the first byte sent to the last weight written; of a restart with its merge.
        waited_s: of these, until the server had decided.
        made_good_steps: steps of this island in an update that is made good: taken before it was interrupted, and not
            again since. 0 where it is missing.
    """

    round: int
    islands: tuple[str, ...]
    missing: tuple[str, ...]
    bytes_sent: int
    bytes_received: int
    exchange_s: float
    waited_s: float
    made_good_steps: int
