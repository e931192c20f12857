"""Where the processes of a run meet: in a file on one machine, or over the network where they are on several.

On several machines each process was started by srun, torchrun or by hand, and starts its one rank itself
(``distributed.launch``). These launchers meet at a store that the first of them hosts: they see that all have come and
agree, find the network interface that reaches the others, tell each other what has ended a rank, and leave together.
The ranks meet at the same store. It speaks without encryption or passwords, as torch's own: for networks behind a
firewall, such as a cluster's.
"""

from __future__ import annotations

import itertools
import socket
import struct
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from select import select

import torch.distributed as dist

from flexlib.errors import InputError
from flexlib.workflow_support.places import Place

MEETING_S = 300.0  # that all have to come
GRACE_S = 5.0  # that others have to speak or listen, where one has failed
LEAVING_S = 60.0  # that others have to end where all is done
_POLL_S = 0.2
_SIGNS_OF_LOSS = ("gloo", "Gloo", "DistBackendError", "DistNetworkError")  # in the traceback of a rank that lost others

_numbers = itertools.count()  # of the meetings of this process, which may train and then reconstruct


@dataclass(frozen=True)
class StoreAddress:
    """Where ranks find their store."""

    size: int
    file: str = ""
    host: str = ""
    port: int = 0
    prefix: str = ""

    def open(self) -> dist.Store:
        """The store, as a rank's own."""
        if self.file:
            return dist.FileStore(self.file, self.size)
        return dist.PrefixStore(self.prefix, dist.TCPStore(self.host, self.port, timeout=timedelta(seconds=MEETING_S)))


class OneMachine:
    """The meeting of ranks that are all started here."""

    poll_s = None  # a launcher may wait for its ranks as long as it takes: there is nobody else to hear of

    def __init__(self, size: int, folder: str) -> None:
        self.size = size
        self.ranks = range(size)
        self.address = StoreAddress(size, file=f"{folder}/store")
        self.interface = "lo" if sys.platform == "linux" else None  # a machine's own name need not resolve

    def describe(self) -> str:
        """Where the ranks are, as the end of a sentence."""
        return ""

    def gpu(self, rank: int, visible: int) -> int:
        """Which of the visible GPUs is a rank's."""
        return rank

    def failure(self) -> BaseException | None:
        """What has ended the run elsewhere."""
        return None

    def settle(self, cause: Exception) -> BaseException:
        """What to raise where ``cause`` has ended the ranks here."""
        return cause

    def end(self) -> BaseException | None:
        """Leave, after the ranks here; what to raise where others have failed meanwhile."""
        return None

    def close(self) -> None:
        """Give back what is held."""


class Meeting:
    """The meeting of launchers of one rank each. Every store's key is written by one of them, but for "failure".

    Parameters
    ----------
    place
        Of this process.
    device
        What its rank computes on, "cuda" or "cpu".

    Raises
    ------
    InputError
        They do not find each other, or do not agree on their number or device.
    """

    poll_s = 0.5

    def __init__(self, place: Place, device: str) -> None:
        self.size = place.size
        self.ranks = range(place.rank, place.rank + 1)
        self._place = place
        self._where = f"{place.host}:{place.port}"
        prefix = f"flexlib/{place.run}/{next(_numbers)}"
        self._first = _reach_first(place)
        # the first, which hosts the store, knows itself by this name, whatever the network makes of its own
        host, seen = (place.host, self._first.getpeername()[0]) if self._first else ("127.0.0.1", "127.0.0.1")
        self.address = StoreAddress(place.size, host=host, port=place.port, prefix=f"{prefix}/ranks")
        self._store = dist.PrefixStore(prefix, _open_store(place, host))
        self._hosts: list[str] = []
        try:
            self.interface = interface_to(self._greet(seen, device))
        except dist.DistError as error:
            self.close()
            raise InputError(f"process {place.rank + 1} of {place.size}: lost the first at {self._where}") from error
        except InputError:
            self.close()
            raise

    def describe(self) -> str:
        """Where the ranks are, as the end of a sentence."""
        return f", at {' '.join(sorted(set(self._hosts)))}, by {self.interface or 'a network of unknown name'}"

    def gpu(self, rank: int, visible: int) -> int:
        """Which of the visible GPUs is a rank's: the only one, where its starter shows it no other."""
        return self._place.local_rank if visible > 1 else 0

    def _greet(self, seen: str, device: str) -> str:
        """Wait until all have come and agree; the address of the first's machine as the others see it."""
        place, host = self._place, socket.gethostname()
        if self._store.add(f"count/{place.rank}", 1) > 1:
            self._refuse(f"two processes have RANK {place.rank}")
        elif place.rank:
            size, kind, first, _ = self._get("here/0")
            for what, own, its in (("WORLD_SIZE", str(place.size), size), ("device", device, kind)):
                if own != its:
                    self._refuse(
                        f"{what} is {own} for process {place.rank + 1} ({host}), {its} for the first ({first})"
                    )
        self._set(f"here/{place.rank}", str(place.size), device, host, seen)
        if place.rank == 0:
            self._open_meeting()
        address, *self._hosts = self._get("open")
        self._set(f"read/{place.rank}")
        if self._store.check(["refused"]):
            if place.rank == 0:
                self._wait_for("read", GRACE_S)
            raise InputError(self._get("refused")[0])
        return address

    def _open_meeting(self) -> None:
        """What the first does: wait for the others, and say to all that they are there."""
        missing = self._wait_for("here", MEETING_S, until="refused")
        if missing and not self._store.check(["refused"]):
            which = " ".join(str(rank + 1) for rank in missing)
            come = f"{self.size - len(missing)} of {self.size} processes have come to {self._where}"
            self._refuse(f"{come} within {MEETING_S:.0f} s; not these: {which}")
        present = [self._get(f"here/{rank}") for rank in range(self.size) if rank not in missing]
        addresses = sorted({seen for *_, seen in present[1:]}, key=lambda address: address.startswith("127."))
        self._set("open", next(iter(addresses), ""), *(host for _, _, host, _ in present))

    def _refuse(self, why: str) -> None:
        """Let nobody begin: all raise this, when the first has seen it."""
        self._set("refused", why)

    def _set(self, key: str, *words: str) -> None:
        self._store.set(key, "\0".join(words))

    def _get(self, key: str) -> list[str]:
        """What was said under a key, when it has been said."""
        self._store.wait([key], timedelta(seconds=2 * MEETING_S))
        return self._store.get(key).decode().split("\0")

    def _wait_for(self, what: str, seconds: float, until: str = "failure") -> list[int]:
        """Those that have not said ``what`` in time, or when somebody has said ``until``."""
        deadline = time.monotonic() + seconds
        while missing := [rank for rank in range(self.size) if not self._store.check([f"{what}/{rank}"])]:
            if time.monotonic() > deadline or (until != what and self._store.check([until])):
                break
            time.sleep(_POLL_S)
        return missing

    def failure(self) -> BaseException | None:
        """What has ended the run elsewhere; says, if somebody asks, that this process is still there."""
        if self._first and select([self._first], [], [], 0)[0]:  # nothing is said there: it is closed
            return self._first_is_gone()
        try:
            if self._store.check(["loss"]):
                self._set(f"alive/{self._place.rank}")
            return self._as_told() if self._store.check(["failure"]) else None
        except dist.DistError:
            return self._first_is_gone()

    def settle(self, cause: Exception) -> BaseException:
        """What to raise where ``cause`` has ended the rank here: what ended the run first, and only in one place."""
        try:
            if not isinstance(cause, InputError) and any(sign in str(cause) for sign in _SIGNS_OF_LOSS):
                cause = self._who_was_lost() or cause
            kind = "input" if isinstance(cause, InputError) else "error"
            self._store.compare_set("failure", "", f"{kind}\0{cause}")
            return self._as_told()
        except dist.DistError:
            return self._first_is_gone()

    def _who_was_lost(self) -> RuntimeError | None:
        """The rank here has lost others: which, unless these speak for themselves."""
        self._set("loss")
        self._set(f"alive/{self._place.rank}")
        silent = self._wait_for("alive", GRACE_S)
        if self._store.check(["failure"]) or not silent:
            return None
        which = ", ".join(f"{rank + 1} of {self.size} ({self._hosts[rank]})" for rank in silent)
        return RuntimeError(f"process {which} is gone without a word: was its machine or job ended?")

    def _as_told(self) -> BaseException:
        """The failure that was told first, for the first process to raise; the others end without a word."""
        kind, text = self._get("failure")
        if self._place.rank == 0:
            self._set("read/failure/0")
            self._wait_for("read/failure", GRACE_S, until="read/failure")
            return InputError(text) if kind == "input" else RuntimeError(text)
        # not before the first has heard: where one ends in failure, srun and torchrun end the others
        deadline = time.monotonic() + GRACE_S
        while not self._store.check(["read/failure/0"]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._set(f"read/failure/{self._place.rank}")
        time.sleep(1.0)
        return SystemExit(1)

    def _first_is_gone(self) -> RuntimeError:
        where = f"process 1 of {self.size}, at {self._where},"
        return RuntimeError(f"{where} is gone, and with it this one, process {self._place.rank + 1}")

    def end(self) -> BaseException | None:
        """Leave when the first has, whose last files must be written; what to raise where somebody failed meanwhile."""
        try:
            if self._place.rank == 0:
                self._set("ended")
                self._set("left/0")
                self._wait_for("left", LEAVING_S)
                return self.failure()
            while not self._store.check(["ended"]):
                if failure := self.failure():
                    return failure
                time.sleep(_POLL_S)
            self._set(f"left/{self._place.rank}")
        except dist.DistError:
            return self._first_is_gone()
        return None

    def close(self) -> None:
        """Give back what is held; a store that others may still ask stays."""
        if self._first:
            self._first.close()


def _reach_first(place: Place) -> socket.socket | None:
    """A connection to the port of the first process, when it listens; None for a first that is to listen itself.

    Raises
    ------
    InputError
        The name cannot be resolved, or nobody listens in time.
    """
    if place.rank == 0 and not place.is_hosted:
        return None
    deadline = time.monotonic() + MEETING_S
    where = f"MASTER_ADDR {place.host}, MASTER_PORT {place.port}"
    while True:
        try:
            return socket.create_connection((place.host, place.port), timeout=MEETING_S)
        except socket.gaierror as error:
            raise InputError(f"{where}: no machine of this name is known here") from error
        except OSError as error:
            if time.monotonic() > deadline:
                late = f"the first process was not there within {MEETING_S:.0f} s"
                raise InputError(f"{where}: {late} ({error})") from error
            time.sleep(_POLL_S)


@cache  # a host listens until its process ends: others may still ask, and it may launch again
def _open_store(place: Place, host: str) -> dist.TCPStore:
    hosts = place.rank == 0 and not place.is_hosted
    patience = timedelta(seconds=MEETING_S)
    try:
        return dist.TCPStore(host, place.port, is_master=hosts, wait_for_workers=False, timeout=patience)
    except dist.DistError as error:
        what = "is taken" if hosts else f"of {place.host} does not answer as it should"
        raise InputError(f"port {place.port} {what}: give another as MASTER_PORT") from error


def interface_to(address: str) -> str | None:
    """The network interface that reaches an IPv4 address, perhaps the machine's own; None where that is unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            return _interfaces().get(probe.getsockname()[0])
    except OSError:
        return None


def _interfaces() -> dict[str, str]:
    """The machine's interfaces by their addresses."""
    if sys.platform != "linux":
        return {}
    from fcntl import ioctl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = ioctl(asked, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:  # it has no address
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    return found
