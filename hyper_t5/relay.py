"""A port on this host that leads to another, and whose connections never break: a program.

    python -I -S relay.py HOST PORT SECONDS

It prints the port that it listens at, and passes on what comes. SECONDS is how long it tries to
reach the other side for the first time. When the other side is gone it prints `gone` and keeps its
own side open, so that a client in C++ that would abort has nothing to see. It ends when its input
does, that is, with the process that started it.

It is a process of its own because threads would wait for the interpreter's lock, and JAX holds that
in calls that wait for what goes through here. The standard library is enough for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time


class Relay:
    """The listening port, and the connections made through it."""

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self.target = (host, port)
        self.until = time.monotonic() + seconds
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.kept: list[socket.socket] = []  # what is closed here is seen by the client

    def serve(self) -> None:
        """Accept connections for ever."""
        while True:
            here, _ = self.listener.accept()
            self.kept.append(here)
            try:
                there = self.dial()
            except OSError:
                gone()
                continue
            self.until = 0.0  # it was there; when it is not, it is gone
            hung_up = threading.Event()
            for end in (here, there):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for function in (self.up, self.down):
                threading.Thread(target=function, args=(here, there, hung_up), daemon=True).start()

    def dial(self) -> socket.socket:
        """Connect to the other side; OSError when it is not there in time."""
        while True:
            try:
                made = socket.create_connection(self.target, timeout=5)
                made.settimeout(None)
                return made
            except OSError:
                if time.monotonic() > self.until:
                    raise
            time.sleep(0.05)

    def up(self, here: socket.socket, there: socket.socket, hung_up: threading.Event) -> None:
        """From the client to the other side, until the client hangs up."""
        copy(here, there)
        hung_up.set()
        with contextlib.suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)

    def down(self, here: socket.socket, there: socket.socket, hung_up: threading.Event) -> None:
        """From the other side to the client, until either is gone."""
        copy(there, here)
        if hung_up.is_set():
            self.kept.remove(here)
            here.close()
        else:
            gone()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Pass on all that comes, until an end is closed."""
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)


def gone() -> None:
    """Say that the other side is gone."""
    print("gone", flush=True)


def main() -> None:
    """Read the arguments, serve, end with the input."""
    # At the shutdown of a host all its processes get a signal; this one goes with its owner.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    relay = Relay(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    print(relay.listener.getsockname()[1], flush=True)
    threading.Thread(target=relay.serve, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
