"""Two machines for tests: network namespaces joined by a cable (a veth pair), each with a process of a run.

Namespaces need root, and a container that permits them. Where they are not to be had, the two processes meet on this
machine's loopback: the same protocol, but nothing is shown of interfaces.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

ADDRESSES = ("10.231.87.1", "10.231.87.2")
INTERFACES = ("cable0", "cable1")


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


@dataclass(frozen=True)
class Machines:
    """Two machines: what starts a program on each, the first's address, and the interfaces that join them."""

    prefixes: tuple[list[str], list[str]]
    address: str
    interfaces: tuple[str, str]

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Machines]:
        """The machines; they are gone after."""
        names = [f"flexlib-{os.getpid()}-{number}" for number in (0, 1)]
        try:
            if all(_ip("netns", "add", name) for name in names) and _ip("netns", "exec", names[0], "true"):
                first, second = (["name", cable, "netns", name] for cable, name in zip(INTERFACES, names, strict=True))
                assert _ip("link", "add", *first, "type", "veth", "peer", *second)
                for name, cable, address in zip(names, INTERFACES, ADDRESSES, strict=True):
                    assert _ip("-n", name, "address", "add", f"{address}/30", "dev", cable)
                    assert all(_ip("-n", name, "link", "set", link, "up") for link in (cable, "lo"))
                prefixes = tuple(["ip", "netns", "exec", name] for name in names)
                yield cls((prefixes[0], prefixes[1]), ADDRESSES[0], INTERFACES)
            else:
                yield cls(([], []), "127.0.0.1", ("lo", "lo"))
        finally:
            for name in names:
                _ip("netns", "delete", name)

    def run(self, work: Callable[..., None], *arguments: Any) -> list[tuple[int, str]]:
        """Launch ``work`` as two processes, one on each machine; exit status and what each has said."""
        port = free_port()
        order = pickle.dumps((work, arguments)).hex()
        started = [
            subprocess.Popen(
                [*prefix, sys.executable, __file__, order],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "OMP_NUM_THREADS": "1",
                    "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch warns that the addresses have no names
                    **{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": self.address, "MASTER_PORT": str(port)},
                },
            )
            for rank, prefix in enumerate(self.prefixes)
        ]
        said = [process.communicate(timeout=300)[0] for process in started]
        return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def main() -> None:
    """What one of the machines runs: like the workflow's scripts, it logs, and ends with 1 and an error's message."""
    from flexlib.distributed import launch
    from flexlib.runtime import tune_process

    tune_process()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    work, arguments = pickle.loads(bytes.fromhex(sys.argv[1]))
    try:
        launch(work, arguments, 2, "cpu")
    except Exception as error:
        logging.error("%s: %s", type(error).__name__, error)
        sys.exit(1)


if __name__ == "__main__":
    main()
