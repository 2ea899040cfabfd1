"""The server of the islands: its sockets, and the loop between them and `Relay`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from relora_ds.islands.address import endpoint
from relora_ds.islands.door import Door
from relora_ds.islands.framing import MalformedError, Message, pack, unpack
from relora_ds.islands.messages import REQUESTS
from relora_ds.islands.relay import Relay
from relora_ds.islands.rounds import Rounds
from relora_ds.islands.secret import checked, keys_of
from relora_ds.islands.sockets import server_socket

LEASE_S = 20.0
_POLL_MS = 250
_BURST = 64  # messages between two looks at the clock
_LONGEST_WAIT_S = 60.0


class Server:
    """A server, listening since it was made.

    Attributes:
        address: where it listens, e.g. "tcp://0.0.0.0:5555".

    Raises:
        ValueError: the address or the secret is none, or another server has the directory. OSError: the address is
            taken, or the directory cannot be written.
    """

    def __init__(
        self,
        listen: str,
        directory: Path,
        secret: str,
        *,
        timeout_s: float | None = None,
        keep_rounds: int = 200,
        lease_s: float = LEASE_S,
        say: Callable[[str], None] = print,
    ):
        self._say = say
        self._stopping = threading.Event()
        self._clock, self._ticked = 0.0, time.monotonic()
        self._waiting: list[tuple[bytes, Message, float]] = []  # routing id, request for a decision, until when
        where, keys = endpoint(listen, "--listen", to_listen=True), keys_of(checked(secret, "secret"))
        self._rounds = Rounds(directory)
        self._context = zmq.Context()
        try:
            self._router = server_socket(self._context, keys, where)
            self._door = Door(self._context, self._router, keys, say)
            try:
                self._router.bind(where)
            except zmq.ZMQError as error:
                raise OSError(f"--listen: {listen}: {error}; take another address or port") from None
            self.address = self._router.get_string(zmq.LAST_ENDPOINT)
            self._relay = Relay(
                self._rounds, timeout_s=timeout_s, lease_s=lease_s, keep_rounds=keep_rounds, now=self._clock, say=say
            )
        except BaseException:
            self._context.destroy(linger=0)
            self._rounds.close()
            raise

    def run(self) -> None:
        """Serve until `stop` is called, from a signal handler or another thread.

        Raises:
            OSError: the directory cannot be written; clients wait until a server has it again.
        """
        self._say(
            f"listening on {self.address}, {self._relay.decided} rounds decided, directory {self._rounds.directory}"
        )
        poller = zmq.Poller()
        for socket in (self._router, *self._door.sockets):
            poller.register(socket, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                poller.poll(_POLL_MS)
                self._tick()
                self._door.look(self._clock)
                self._receive()
                self._relay.decide(self._clock)
                self._answer_waiting()
        finally:
            self._relay.close()
            self._door.close()
            self._context.destroy(linger=0)
            self._rounds.close()
        self._say("stopped")

    def stop(self) -> None:
        """Let `run` return within a moment."""
        self._stopping.set()

    def _tick(self) -> None:
        """Advance the clock. While this process stood still no client could be heard, so that time does not count."""
        now = time.monotonic()
        self._clock += min(now - self._ticked, 1.0)
        self._ticked = now

    def _receive(self) -> None:
        for _ in range(_BURST):
            try:
                routing, *frames = self._router.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            self._door.know(routing.get(zmq.SRCFD))
            try:
                request = unpack([bytes(frame.buffer) for frame in frames], REQUESTS)
            except MalformedError as error:
                self._say(f"ignored a malformed message: {error}")
                if error.number is not None:
                    self._send(routing.bytes, Message("error", {"id": error.number, "text": f"islands: {error}"}))
                continue
            self._answer(routing.bytes, request, self._clock + min(request.fields.get("wait_s", 0), _LONGEST_WAIT_S))

    def _answer(self, routing: bytes, request: Message, until: float) -> None:
        reply = self._relay.answer(request, self._clock)
        if reply and reply.kind == "pending" and self._clock < until:
            self._waiting.append((routing, request, until))
        elif reply:
            self._send(routing, reply)

    def _answer_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for routing, request, until in waiting:
            if request.fields["round"] <= self._relay.decided or self._clock >= until:
                self._answer(routing, request, until)
            else:
                self._waiting.append((routing, request, until))

    def _send(self, routing: bytes, reply: Message) -> None:
        try:
            frames = pack(reply)
        except ValueError as error:  # it is too large
            frames = pack(Message("error", {"id": reply.fields["id"], "text": f"islands: {error}"}))
        self._router.send_multipart([routing, *frames])
