"""A client's connection: requests with numbers, repeated after the connection has broken, and an end to waiting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from relora_ds.islands.framing import Message, pack, unpack
from relora_ds.islands.messages import REPLIES
from relora_ds.islands.refusals import LinkError, LinkRefused, Stopped
from relora_ds.islands.secret import VARIABLE, Keys
from relora_ds.islands.sockets import client_socket

REPEAT_S = 60.0  # of silence, though the connection stands
PATIENCE_S = 10.0  # once this rank is asked to stop: launchers give it 30 s, and an exchange on a fast link ends first
_HANDSHAKES = 5  # that fail before the first that does not; a server that is killed in the middle fails one
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Channel:
    """A connection of one rank, for one thread.

    Args:
        context: of ZeroMQ.
        address: the server's.
        keys: of the secret.
        sender: fields of every request.
        timeout_s: how long the server may be silent.

    Attributes:
        is_asked_to_stop: looked at while the server is waited for; `Stopped` is raised soon after it is true.
    """

    def __init__(self, context: zmq.Context, address: str, keys: Keys, sender: dict[str, Any], timeout_s: float):
        self._address, self._sender, self._timeout_s = address, sender, timeout_s
        self.is_asked_to_stop: Callable[[], bool] = lambda: False
        self._asked: float | None = None  # when that was seen
        self._number = 0
        self._open: tuple[int, str, dict[str, Any]] | None = None  # a request that `ask` has left without a reply
        self._heard = self._repeated = time.monotonic()
        self._handshakes = self._failures = 0
        self._socket = client_socket(context, keys, address)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(address)

    def begin(self) -> int:
        """Return the number of a new request; replies to earlier ones are ignored from now on."""
        self._number += 1
        self._heard = self._repeated = time.monotonic()
        return self._number

    def send(self, kind: str, fields: dict[str, Any], payload: bytes = b"") -> None:
        """Send a message of the request that has begun. One that finds no room is lost, as with a connection.

        Raises:
            ValueError: the fields are not JSON, or too large.
        """
        frames = pack(Message(kind, {"id": self._number, **self._sender, **fields}, payload))
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart(frames, zmq.DONTWAIT)

    def receive(self) -> Message | None:
        """Return the next reply to the request that has begun, None if what has no reply yet should be sent again.

        Raises:
            LinkRefused: the server refuses the request, or the secret. LinkError: it is silent.
        """
        while True:
            reply, is_lost = self._wait()
            if reply is not None or is_lost:
                return reply

    def call(self, kind: str, **fields: Any) -> Message:
        """Send a request and return its reply.

        Raises:
            LinkRefused: the server refuses the request, or the secret. LinkError: it is silent.
        """
        self.begin()
        while True:
            self.send(kind, fields)
            if reply := self.receive():
                return reply

    def ask(self, kind: str, patience_s: float, **fields: Any) -> Message | None:
        """Send a request and return its reply, None after `patience_s` without one.

        The next call with the same arguments waits on for the same reply, and the server's silence is counted on.

        Raises:
            LinkRefused: the server refuses the request, or the secret. LinkError: it is silent.
        """
        if self._open != (self._number, kind, fields):
            self.begin()
            self.send(kind, fields)
        self._open = None
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            reply, is_lost = self._wait()
            if reply is not None:
                return reply
            if is_lost:
                self.send(kind, fields)
        self._open = (self._number, kind, fields)
        return None

    def close(self) -> None:
        """Close the connection."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def _wait(self) -> tuple[Message | None, bool]:
        """Wait for a second at most. Return the reply, None without one, and whether to send the request again."""
        self._check_stop()
        ready = dict(self._poller.poll(1000))
        if self._monitor in ready and self._has_reconnected():
            return None, True
        if self._socket in ready:
            reply = unpack(self._socket.recv_multipart(), REPLIES)
            self._heard = time.monotonic()
            if reply.fields["id"] != self._number:
                return None, False
            if reply.kind == "error":
                raise LinkRefused(reply.fields["text"])
            return reply, False
        self._check_silence()
        if time.monotonic() - max(self._heard, self._repeated) > REPEAT_S:
            self._repeated = time.monotonic()
            return None, True
        return None, False

    def _has_reconnected(self) -> bool:
        """Read the monitor; returns whether a connection stands again, on which nothing has been asked yet."""
        before = self._handshakes
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._handshakes += 1
            elif event & _FAILED and not self._handshakes:
                self._failures += 1
                if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH or self._failures >= _HANDSHAKES:
                    raise LinkRefused(
                        f"{VARIABLE}: the handshake with {self._address} failed, so the server there has another "
                        "secret, or is no server of islands; give it and every island the same secret"
                    )
        return before > 0 and self._handshakes > before

    def _check_stop(self) -> None:
        if not self.is_asked_to_stop():
            return
        now = time.monotonic()
        self._asked = self._asked or now
        if now - self._asked > PATIENCE_S:
            raise Stopped(f"asked to stop, and gave up waiting for {self._address}")

    def _check_silence(self) -> None:
        if (silent_s := time.monotonic() - self._heard) > self._timeout_s:
            raise LinkError(
                f"islands: nobody has answered at {self._address} for {silent_s:.0f} s; start the server there, "
                "`relora islands serve`, or correct the address, and start this island again"
            )
