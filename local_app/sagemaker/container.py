"""Turns a new mount and PID namespace into a training container, then becomes the job's entry point.

`unshare` runs it as PID 1 of the job: `python -I -S container.py <job's ml folder> <entry point> [arguments]`.
It needs only the standard library, and works as root and as the root of a user namespace. It mounts and does not write: the
host does not change, and the mounts vanish with the job.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

MS_BIND, MS_REC = 0x1000, 0x4000  # <sys/mount.h>
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40  # <net/if.h>


def mount(source: str, target: Path, kind: str | None = None, flags: int = 0) -> None:
    """Call mount(2). Raises OSError with the target."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), bytes(target), kind.encode() if kind else None, ctypes.c_ulong(flags), None):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def make_mount_point(path: Path) -> None:
    """Make `path` exist in this namespace only: its parent becomes a tmpfs with the parent's earlier content.

    The interpreter itself may be beside `path` (in /opt/python, for example), so every neighbour is bound to its path again.
    The open descriptor still reaches the folder under the tmpfs.
    """
    parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    neighbours = [(entry.name, entry.is_symlink(), entry.is_dir()) for entry in os.scandir(path.parent)]
    mount("tmpfs", path.parent, "tmpfs")
    for name, is_symlink, is_folder in neighbours:
        original, target = f"/proc/self/fd/{parent}/{name}", path.parent / name
        if is_symlink:
            target.symlink_to(Path(original).readlink())
        else:
            target.mkdir() if is_folder else target.touch()
            mount(original, target, flags=MS_BIND | MS_REC)
    path.mkdir()
    os.close(parent)


def bring_up_loopback() -> None:
    """Bring up `lo`, which is down in a new network namespace; torch's rendezvous uses 127.0.0.1."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP | IFF_RUNNING))


def main(ml: str, *command: str) -> None:
    """Build the container's view of the machine and exec `command` in it. Does not return."""
    opt_ml = Path("/opt/ml")
    if not opt_ml.is_dir():
        if not opt_ml.parent.is_dir():
            sys.exit("/opt does not exist on this machine. Create the empty folder /opt/ml as root.")
        make_mount_point(opt_ml)
    if (hosts := Path(ml).with_name("hosts")).exists():  # the names of the job's instances
        mount(str(hosts), Path("/etc/hosts"), flags=MS_BIND)
    mount(ml, opt_ml, flags=MS_BIND)
    mount("proc", Path("/proc"), "proc")  # /proc shows the job's own processes only
    if os.environ.pop("TUNEDROP_NETWORK_ISOLATION", ""):
        bring_up_loopback()
    os.chdir("/")
    try:
        os.execvp(command[0], command)  # noqa: S606 - the request's entry point, without a shell
    except OSError as error:
        print(f"exec {command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - goes to the job's log
        sys.exit(127)  # a container runtime's exit code for a missing entry point


if __name__ == "__main__":
    main(*sys.argv[1:])
