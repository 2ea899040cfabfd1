"""`relora islands serve DIRECTORY`."""

import argparse
import signal
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("serve",), help="serve: relay their updates until Ctrl-C or SIGTERM")
    parser.add_argument(
        "directory",
        type=Path,
        metavar="DIRECTORY",
        help="where the rounds are kept; start the server again with the same one",
    )
    parser.add_argument(
        "--listen", default="tcp://0.0.0.0:5555", metavar="HOST:PORT", help="port 0 is any free one, and is printed"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        help="how long an exchange waits for islands after the first has arrived (default: their islands.timeout_s)",
    )
    parser.add_argument(
        "--keep-rounds",
        type=int,
        default=200,
        metavar="N",
        help="how many rounds are kept at most for islands that come back (default: %(default)s)",
    )
    parser.add_argument(
        "--secret-file",
        type=Path,
        metavar="FILE",
        help="holds the secret (default: the variable RELORA_ISLANDS_SECRET)",
    )


def run(arguments: argparse.Namespace) -> int:
    from relora_ds.islands.requirement import require_zmq

    if arguments.timeout is not None and arguments.timeout <= 0:
        raise ValueError(f"--timeout: {arguments.timeout:g} s is no time to wait; use e.g. 600")
    if arguments.keep_rounds < 1:
        raise ValueError(f"--keep-rounds: {arguments.keep_rounds} would keep no round; give at least 1")
    require_zmq()
    from relora_ds.islands.secret import read_secret
    from relora_ds.islands.server import Server

    server = Server(
        arguments.listen,
        arguments.directory,
        read_secret(arguments.secret_file),
        timeout_s=arguments.timeout,
        keep_rounds=arguments.keep_rounds,
        say=_say,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.run()
    return 0


def _say(text: str) -> None:
    """Print one line; a name in it may hold characters that the terminal lacks."""
    text = " ".join(text.split()).encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(errors="replace")
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)
