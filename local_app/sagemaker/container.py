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
PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = 24, 28, 38  # <linux/prctl.h>
SECBIT_NOROOT, SECBIT_NOROOT_LOCKED = 0x1, 0x2  # <linux/securebits.h>
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


def hide(folder: Path, kept: Path) -> None:
    """Replace a folder's content by the file `kept` in it, in this namespace only."""
    file = os.open(kept, os.O_PATH)
    mount("tmpfs", folder, "tmpfs")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    mount(f"/proc/self/fd/{file}", kept, flags=MS_BIND)
    os.close(file)


def drop_capabilities() -> None:
    """Take root's rights from the next program: it cannot unmount what hides a folder, nor change the machine.

    https://man7.org/linux/man-pages/man7/capabilities.7.html
    """
    libc, number = ctypes.CDLL(None), 0
    while not libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0):
        number += 1
    libc.prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED, 0, 0, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        sys.exit("This kernel does not let a process give up its rights (prctl PR_SET_NO_NEW_PRIVS).")


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
    if private := os.environ.pop("TUNEDROP_PRIVATE", ""):  # the local app's folder, with root's credentials
        hide(Path(private), Path(os.environ["AWS_CA_BUNDLE"]))
    mount("proc", Path("/proc"), "proc")  # /proc shows the job's own processes only
    if os.environ.pop("TUNEDROP_NETWORK_ISOLATION", ""):
        bring_up_loopback()
    os.chdir("/")
    drop_capabilities()
    try:
        os.execvp(command[0], command)  # noqa: S606 - the request's entry point, without a shell
    except OSError as error:
        print(f"exec {command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - goes to the job's log
        sys.exit(127)  # a container runtime's exit code for a missing entry point


if __name__ == "__main__":
    main(*sys.argv[1:])
