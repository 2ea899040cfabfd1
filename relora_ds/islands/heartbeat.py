"""Tell the server that an incarnation lives, also while its ranks compute for an hour."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import zmq

from relora_ds.islands.framing import Message, pack
from relora_ds.islands.secret import Keys
from relora_ds.islands.sockets import client_socket


class Heartbeat(threading.Thread):
    """A thread with a socket of its own that sends a ping every `every_s` seconds."""

    def __init__(self, context: zmq.Context, address: str, keys: Keys, sender: dict[str, Any], every_s: float):
        super().__init__(name="islands heartbeat", daemon=True)
        self._context, self._address, self._keys = context, address, keys
        self._frames, self._every_s = pack(Message("ping", {"id": 0, **sender})), every_s
        self._stopping = threading.Event()
        self.start()

    def run(self) -> None:
        """Send until `stop`."""
        with client_socket(self._context, self._keys, self._address) as socket:
            socket.sndhwm = 1  # pings do not gather while there is no server
            socket.connect(self._address)
            while not self._stopping.is_set():
                with contextlib.suppress(zmq.Again):
                    socket.send_multipart(self._frames, zmq.DONTWAIT)
                self._stopping.wait(self._every_s)

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self.join()
