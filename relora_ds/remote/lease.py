"""One run in a store, one process that writes it.

A store has no locks that end with their process. So the process that writes a run renews an object there, `lock`. A
start that finds one waits whether it is renewed: if so, the start is refused; if not, its process has died. A process
whose object was replaced by another one's stops uploading.
"""

import json
import logging
import threading
import time
import uuid

from relora_ds.remote.place import Place, RemoteError, RemoteMissingError

logger = logging.getLogger(__name__)

NAME = "lock"
RENEW_S = 15.0  # between renewals
DEAD_S = 60.0  # without a renewal, after which a process counts as dead
SETTLE_S = 1.0  # after which the later one of two simultaneous starts is seen
_LAST_CALL_S = 3.0  # for giving it up: the store may hang, and a process that was asked to stop is killed after 30 s


class Lease:
    """This process's object in a store.

    Args:
        holder: this process, in words.
        run_dir: of its run.

    Attributes:
        lost: why this process may not write there any more; "" while it may.
    """

    def __init__(self, place: Place, holder: str, run_dir: str):
        self._place, self.lost = place, ""
        self._about = {"holder": holder, "run_dir": run_dir, "start": uuid.uuid4().hex}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, dead: str) -> None:
        """Begin to write there. Takes a minute where another process has died there.

        Args:
            dead: a holder that is known to have died, in words.

        Raises:
            ValueError: another process writes there. RemoteError: the store refuses.
        """
        found = self._read()
        if found and not (dead and (found.get("holder"), found.get("run_dir")) == (dead, self._about["run_dir"])):
            logger.info("checkpoint.remote: waiting for up to %.0f s whether %s still writes", DEAD_S, _who(found))
            deadline = time.monotonic() + DEAD_S
            while time.monotonic() < deadline:
                time.sleep(min(1.0, DEAD_S / 10))
                now = self._read()
                if not now:
                    break
                if now != found:
                    raise ValueError(self._occupied(now))
        self._write(0)
        time.sleep(SETTLE_S)
        now = self._read()
        if now.get("start") != self._about["start"]:
            raise ValueError(self._occupied(now))
        self._thread = threading.Thread(target=self._renew, name="remote lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Raise RemoteError if this process may not write there any more."""
        if self.lost:
            raise RemoteError(self.lost)

    def close(self) -> None:
        """Give it up, unless it is another one's. A store that hangs is not waited for."""
        if self._thread is None:
            return
        self._ended.set()
        last = threading.Thread(target=self._delete, args=(self._thread,), daemon=True)
        last.start()
        last.join(_LAST_CALL_S)
        self._thread = None

    def _renew(self) -> None:
        number = 0
        while not self._ended.wait(RENEW_S):
            number += 1
            try:
                if (found := self._read()) and found.get("start") != self._about["start"]:
                    self.lost = f"{_who(found)} writes it now"
                    return
                self._write(number)
            except RemoteError as error:  # the next renewal may succeed
                logger.debug("checkpoint.remote: its lock is not renewed: %s", error)

    def _delete(self, renewing: threading.Thread) -> None:
        renewing.join()  # or it could write after this
        try:
            if self._read().get("start") == self._about["start"]:
                self._place.delete(NAME)
        except RemoteError as error:
            logger.debug("checkpoint.remote: its lock stays: %s", error)

    def _read(self) -> dict:
        try:
            found = json.loads(self._place.read(NAME))
        except RemoteMissingError:
            return {}
        except ValueError:  # being written, on a disk
            found = None
        return found if isinstance(found, dict) else {"start": None}

    def _write(self, number: int) -> None:
        self._place.write(NAME, json.dumps({**self._about, "renewals": number}).encode())

    def _occupied(self, found: dict) -> str:
        return (
            f"checkpoint.remote: {self._place.url} is being written by {_who(found)}; stop that one, wait for its end, "
            "or use another prefix"
        )


def _who(found: dict) -> str:
    return f"{found.get('holder', 'another process')} (run_dir {found.get('run_dir', 'unknown')})"
