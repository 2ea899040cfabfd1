"""Sockets of both sides: encrypted and authenticated by CURVE, with limits on what the other side may send."""

from __future__ import annotations

import zmq

from relora_ds.islands.framing import MAX_FRAME
from relora_ds.islands.secret import Keys


def server_socket(context: zmq.Context, keys: Keys, where: str) -> zmq.Socket:
    """Return a ROUTER to bind at `where`; `Door` admits clients to it."""
    socket = _limited(context.socket(zmq.ROUTER), where)
    socket.curve_server = True
    socket.zap_domain, socket.zap_enforce_domain = b"islands", True  # nobody is admitted unless ZAP is answered
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    return socket


def client_socket(context: zmq.Context, keys: Keys, where: str) -> zmq.Socket:
    """Return a DEALER to connect to `where`, which talks only to a server that knows the secret."""
    socket = _limited(context.socket(zmq.DEALER), where)
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = keys.public
    socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 2000  # ms
    return socket


def _limited(socket: zmq.Socket, where: str) -> zmq.Socket:
    socket.linger = 0
    socket.maxmsgsize = MAX_FRAME + 1024  # of one frame, with what encryption adds
    # A connection whose other end is gone is closed, and made again; a minute, since a slow link may be full that long.
    socket.heartbeat_ivl, socket.heartbeat_timeout = 10_000, 60_000
    socket.ipv6 = "[" in where  # not for names: those with addresses of both kinds would be sought at one only
    return socket
