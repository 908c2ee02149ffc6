"""Runs of several ranks in forked processes of one test, which have imported torch already."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def free_port() -> int:
    """One below those that the system hands out: nobody gets it between now and its use by chance."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port := random.SystemRandom().randrange(20_000, 32_000)))
            return port


class Started:
    """Processes of the ranks 0 ... n - 1 and what they wrote to standard error."""

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.pids, self.folder = pids, folder

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit status of each rank, minus the signal that ended it. Those that hang for so long are killed: -9."""
        deadline, found = time.monotonic() + seconds, {}
        while len(found) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank not in found and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    found[rank] = os.waitstatus_to_exitcode(ended[1])
            if time.monotonic() > deadline:
                for rank, pid in enumerate(self.pids):
                    if rank not in found:
                        os.kill(pid, 9)
                        os.waitpid(pid, 0)
                        found[rank] = -9
            time.sleep(0.02)
        return [found[rank] for rank in range(len(self.pids))]

    def words(self, rank: int) -> str:
        """Log and errors of a rank."""
        return (self.folder / f"rank-{rank}.err").read_text()


def start(
    work: Callable[[int], object],
    folder: Path,
    world: int = 2,
    environments: Mapping[int, Mapping[str, str]] | None = None,
) -> Started:
    """Run work(rank) in a process for each rank. environments: rank -> further variables."""
    folder.mkdir(parents=True, exist_ok=True)
    port, pids = free_port(), []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                errors = os.open(folder / f"rank-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(errors, 2)
                sys.stderr = os.fdopen(errors, "w", buffering=1)
                logging.basicConfig(stream=sys.stderr, force=True)
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world}
                os.environ.update({k: str(v) for k, v in place.items()})
                os.environ.update((environments or {}).get(rank, {}))
                work(rank)
                status = 0
            except SystemExit as stop:
                status = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return Started(pids, folder)
