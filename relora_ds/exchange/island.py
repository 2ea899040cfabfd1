"""An island's membership: its settings, and its link to the others, for all engines of a run."""

import hashlib
import json
import platform
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from relora_ds import __version__
from relora_ds.config import IslandsConfig, ReLoRAConfig
from relora_ds.config.island_values import chain_problems, index_problems
from relora_ds.exchange.arrivals import linked
from relora_ds.exchange.exchange import Exchange
from relora_ds.exchange.outer import Outer
from relora_ds.islands.requirement import require_zmq
from relora_ds.islands.secret import read_secret
from relora_ds.lowrank.words import in_python

if TYPE_CHECKING:
    from relora_ds.islands.client import Link

_OF_ALL = (
    "sync_every",
    "outer_optimizer",
    "outer_lr",
    "outer_momentum",
    "compress",
    "compress_factors",
    "moments",
    "timeout_s",
)


class Islands:
    """Makes engines one of several islands: pass it to `relora_ds.initialize`.

    The first forward of an engine raises `LinkRefused` on every rank where the recipe, the version, the network or the
    first weights are not those of the others.

    Args:
        config: `IslandsConfig`, the section `islands` of a recipe.
        identity: JSON values that must be equal on all islands, whatever phase they are in; None: those of the engine.
        secret: of all islands; None: the environment's `RELORA_ISLANDS_SECRET`.
        kept_checkpoints: from how many of the newest ones this island may come back. The server keeps the exchanges
            that the oldest of them lacks.

    Raises:
        ValueError: `count` or `address` is missing, or the secret, or pyzmq; `index` is not below `count`.
    """

    def __init__(
        self,
        config: IslandsConfig,
        identity: Mapping[str, Any] | None = None,
        secret: str | None = None,
        kept_checkpoints: int = 3,
    ):
        if config.count is None or config.address is None:
            raise ValueError("islands: count and address must be set; e.g. IslandsConfig(count=2, address='host:5555')")
        for problem in index_problems(config):
            raise ValueError(problem)
        require_zmq()
        self.config, self._identity = config, None if identity is None else dict(identity)
        self._secret = read_secret() if secret is None else secret
        self.name, self.incarnation = f"{config.index:04d}", ""
        self._link: Link | None = None
        self._exchange: Exchange | None = None
        self._has_joined = False
        self._saved: deque[int] = deque(maxlen=kept_checkpoints)  # exchanges in the newest checkpoints
        self._told: dict[str, Any] = {}

    def problems(self, relora: ReLoRAConfig | None) -> list[str]:
        """Return why engines could not exchange, one message each. relora: of the model; None at full rank."""
        if relora is not None and relora.restart_every is not None:
            return [in_python(problem) for problem in chain_problems(relora)]
        if self.config.sync_every is None:
            return ["islands.sync_every: None, and there are no restarts to exchange at; use e.g. sync_every=500"]
        return []

    def join(self, engine) -> Exchange:
        """Return the exchanges of an engine, which continue those of the engine before. Collective."""
        if self._link is None:
            self._link = self._connect()
        lr, momentum = self.config.outer
        exchange = Exchange(
            engine,
            self._link,
            Outer(lr, momentum),
            self,
            every=self.config.sync_every,
            compression=self.config.compress,
            factor_compression=self.config.compress_factors,
            resets_moments=self.config.moments == "reset",
        )
        if self._exchange is not None:
            exchange.round, exchange.origin = self._exchange.round, self._exchange.origin
        self._exchange = exchange
        return exchange

    def enter(self, exchange: Exchange) -> None:
        """Ask to be one of the islands, once, with an engine that has its values. Collective.

        Raises:
            LinkRefused: another recipe, version, network or weights than the others; names what. On every rank, where
                one of them is refused.
        """
        if self._has_joined:
            return
        if not exchange.origin:
            exchange.origin = _hash_over_ranks(exchange.digests())
        about = _settings(exchange.engine) if self._identity is None else self._identity
        self._told = {**about, **self._of_all(exchange.engine), "the weights at the start": exchange.origin}
        linked(lambda: self._join(exchange))
        self._has_joined = True

    def decided(self, exchange: Exchange) -> int:
        """Return the newest exchange that is decided, the same on every rank. Collective."""
        decided = [0]

        def ask() -> None:
            if dist.get_rank() == 0:
                decided[0] = self._join(exchange)

        linked(ask)
        dist.broadcast_object_list(decided, 0)
        return decided[0]

    @property
    def oldest_needed(self) -> int:
        """The oldest exchange that a resume may have to make good; all, while there are few checkpoints."""
        return min(self._saved) + 1 if len(self._saved) == self._saved.maxlen else 1

    def note_checkpoint(self, round: int) -> None:
        """Note that a checkpoint is written of the state after an exchange."""
        self._saved.append(round)

    def close(self) -> None:
        """Close the link."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _join(self, exchange: Exchange) -> int:
        assert self._link is not None
        return self._link.join(self._told, exchange.round).decided

    def _connect(self) -> "Link":
        from relora_ds.islands.client import Link  # needs pyzmq, which a run that is no island goes without

        config, incarnation = self.config, [uuid.uuid4().hex]
        dist.broadcast_object_list(incarnation, 0)
        self.incarnation = incarnation[0]
        assert config.address is not None and config.count is not None
        return Link(
            config.address,
            self._secret,
            island=self.name,
            incarnation=self.incarnation,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            count=config.count,
        )

    def _of_all(self, engine) -> dict[str, Any]:
        """Return what must be equal in every case."""
        return {
            "relora_ds": __version__,
            "torch": torch.__version__.partition("+")[0],
            "processor": _processor(engine.device),
            **{f"islands.{key}": getattr(self.config, key) for key in _OF_ALL},
        }


def _settings(engine) -> dict[str, Any]:
    """Return what an engine's exchanges depend on, by the names of recipe keys where there are such."""
    curve, relora = asdict(engine.lr_scheduler.config), engine.relora
    return {
        "seed": engine.seed,
        **{f"schedule.{key}": value for key, value in curve.items()},
        **({} if relora is None else {f"relora.{key}": value for key, value in asdict(relora).items()}),
    }


def _processor(device: torch.device) -> str:
    """Return the kind that computes: others round differently in the last bit."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _hash_over_ranks(digests: dict[str, int]) -> str:
    """Return a hash of the checksums of all ranks of this island, each of its own weights. Collective."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, digests)
    everything = sorted(item for one in found for item in one.items())
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]
