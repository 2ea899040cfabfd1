"""Admit those who know the secret, and say who did not."""

from __future__ import annotations

from collections.abc import Callable

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from relora_ds.islands.secret import Keys

SAY_EVERY_S = 10.0
_ZAP = "inproc://zeromq.zap.01"  # where libzmq asks whether a key is admitted


class Door:
    """The ZAP handler and the monitor of a server's socket."""

    def __init__(self, context: zmq.Context, router: zmq.Socket, keys: Keys, say: Callable[[str], None]):
        self._keys, self._say = keys, say
        self._zap = context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        self._router = router
        self._monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._strangers: set[int] = set()  # file descriptors of connections that no message has come through
        self._refused = 0
        self._said_at = -SAY_EVERY_S
        self.sockets = (self._zap, self._monitor)

    def look(self, now: float) -> None:
        """Answer those that knock, and note who left without a message."""
        while self._zap.poll(0):
            version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart()
            is_member = mechanism == b"CURVE" and [z85.encode(key) for key in credentials] == [self._keys.public]
            status = (b"200", b"OK") if is_member else (b"400", b"another secret")
            self._zap.send_multipart([version, request, *status, b"", b""])
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._strangers.add(event["value"])
            elif event["value"] in self._strangers:
                self._strangers.remove(event["value"])
                self._refused += 1
        if self._refused and now - self._said_at >= SAY_EVERY_S:
            self._say(
                f"refused {self._refused} connection{'s' if self._refused > 1 else ''}: the handshake failed, "
                "another secret or no client of the islands"
            )
            self._refused, self._said_at = 0, now

    def know(self, descriptor: int) -> None:
        """Note that a message came through a connection: it was admitted."""
        self._strangers.discard(descriptor)

    def close(self) -> None:
        """Stop admitting."""
        self._router.disable_monitor()
        self._monitor.close()
        self._zap.close()
