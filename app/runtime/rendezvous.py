"""The key-value store through which the processes of torch.distributed find each other."""

import socket
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from app.runtime.launch import Launch

_POLL_SECONDS = 0.02


def make_store(launch: Launch, communicator: Any, *, timeout: timedelta) -> dist.Store:
    """Open a store that all processes reach and that holds nothing yet. A collective call.

    Under MPI process 0 takes a free port and tells the others, so that two programs on a node never
    race for one port. Under torchrun it is the store that torch finds by torchrun's variables,
    hosted by torchrun or by process 0.

    Args:
        launch: this process's index and count.
        communicator: mpi4py communicator of the same processes; None under torchrun.
        timeout: after which a look for a key that is not there is an error.
    """
    if launch.launcher == "torchrun":
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        return new_attempt(store, launch.process_index, launch.process_count)
    size, host = launch.process_count, socket.gethostname()
    if launch.process_index == 0:
        store = dist.TCPStore(
            host, 0, size, is_master=True, wait_for_workers=False, timeout=timeout
        )
        communicator.bcast((host, store.port), root=0)
        return store
    host, port = communicator.bcast(None, root=0)
    return dist.TCPStore(host, port, size, is_master=False, timeout=timeout)


def new_attempt(store: dist.Store, index: int, count: int) -> dist.Store:
    """Return a part of the store that no attempt before this one has written to. Collective.

    torchrun starts all processes anew where one fails, and its store keeps the addresses of the
    dead. Its own count of attempts does not tell them apart: it differs between nodes, since only
    the node on which a process failed counts. So process 0 draws a name, and hands it to whoever
    asks; an answer counts only with the asker's own number, drawn anew, and until all have it
    process 0 goes on answering, since it cannot tell a dead process's question from a living one's.

    Args:
        store: of torchrun, with whatever earlier attempts have left there.
        index: of this process.
        count: of processes.
    """
    mine = uuid.uuid4().hex
    if index:
        store.set(f"oialr/asks/{index}", mine)
        while True:
            asker, _, name = _look(store, f"oialr/answers/{index}").partition(" ")
            if asker == mine:
                store.set(f"{name}/has-it/{index}", "")
                return dist.PrefixStore(name, store)
            time.sleep(_POLL_SECONDS)
    name = f"oialr/attempts/{mine}"
    waiting = set(range(1, count))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{name}/has-it/{other}"]):
                waiting.remove(other)
            elif asker := _look(store, f"oialr/asks/{other}"):
                store.set(f"oialr/answers/{other}", f"{asker} {name}")
        time.sleep(_POLL_SECONDS)
    return dist.PrefixStore(name, store)


def _look(store: dist.Store, key: str) -> str:
    """Return what is stored under a key; empty if nothing is."""
    return store.get(key).decode() if store.check([key]) else ""
