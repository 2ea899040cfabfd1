#!/usr/bin/env python3
"""Start the ranks of this machine and wait for them: start_ranks.py --ranks N ... SCRIPT ARGUMENT ...

DeepSpeed's launcher does the same, and is needed to reach other machines. It imports PyTorch and DeepSpeed twice before
the ranks begin to; here nothing is imported. A rank learns its place from the variables that torchrun and DeepSpeed
set. Where one fails, a signal comes, or the script that started this was killed, the others are asked to end, and
killed half a minute later, or after GRACE_SECONDS of the environment. SIGINT is not passed on: a terminal and launch.sh
send it to the ranks as well. The exit code is that of the rank which failed first, 128 + the signal's number where one
killed it.
"""

import argparse
import os
import signal
import subprocess
import sys
import time

LAST_WORDS_S = 5  # what ends one rank often ends the others too, and one of them says what it is
GRACE_S = int(os.environ.get("GRACE_SECONDS", "30"))  # DeepSpeed's launcher and torchrun give 30


def main() -> int:
    """Return the exit code."""
    arguments = parse_arguments()
    heard, parent = [], os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: heard.append(number))
    ranks = [
        subprocess.Popen([sys.executable, "-u", *arguments.command], env=environment(arguments, local_rank))
        for local_rank in range(arguments.ranks)
    ]
    code, kill_at = 0, None
    while running := [rank for rank in ranks if rank.poll() is None]:
        if os.getppid() != parent:
            heard.append(signal.SIGTERM)
        if kill_at is None and (heard or (code := first_failure(ranks))):
            if not heard:
                time.sleep(LAST_WORDS_S)
            if signal.SIGINT not in heard:  # a second one would interrupt what they do about the first
                signal_all(running, signal.SIGTERM)
            kill_at = time.monotonic() + GRACE_S
        elif kill_at is not None and time.monotonic() > kill_at:
            signal_all(running, signal.SIGKILL)
        time.sleep(0.1)
    return code or first_failure(ranks)


def signal_all(ranks: list[subprocess.Popen], number: signal.Signals) -> None:
    """To those that have not ended meanwhile."""
    for rank in ranks:
        rank.send_signal(number)


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Start the ranks of this machine and wait for them.")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="of this machine")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first one's number (default: 0)")
    parser.add_argument("--world_size", type=int, metavar="N", help="ranks of all machines (default: --ranks)")
    parser.add_argument(
        "--master_addr", default="127.0.0.1", metavar="A", help="where rank 0 is (default: %(default)s)"
    )
    parser.add_argument("--master_port", required=True, metavar="P", help="a free port there")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ARGUMENT ...")
    arguments = parser.parse_args()
    if arguments.ranks < 1:
        parser.error(f"--ranks: {arguments.ranks} is not a number of ranks; use 1 or more")
    return arguments


def environment(arguments: argparse.Namespace, local_rank: int) -> dict[str, str]:
    """Return the variables of one rank."""
    return {
        **os.environ,
        "RANK": str(arguments.first + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(arguments.world_size or arguments.ranks),
        "LOCAL_WORLD_SIZE": str(arguments.ranks),
        "LOCAL_SIZE": str(arguments.ranks),
        "MASTER_ADDR": arguments.master_addr,
        "MASTER_PORT": arguments.master_port,
    }


def first_failure(ranks: list[subprocess.Popen]) -> int:
    """Return the exit code of a rank that failed, 0 where none has."""
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
