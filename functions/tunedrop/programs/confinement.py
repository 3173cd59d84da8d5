"""Takes from a process what it does not need: files, processes, network, signals, memory.

The process itself calls `confine`, before it runs code that nobody trusts. On Linux each step is a system call, through
libc: no program must be installed. `Confinement` says which steps the kernel allowed; a step that it refuses is left out.

- Namespaces (`man 7 namespaces`): another file tree, with the interpreter's files and an empty folder, no network, no
  process beside itself. Containers and Lambda usually refuse these.
- Landlock (`man 7 landlock`, Linux 5.13): reading for the interpreter's files and the folder, writing in the folder only.
- Seccomp (`man 2 seccomp`): no system call that makes a process, runs another file, sends a signal to another process,
  looks into another process, opens a socket, or makes shared memory. Threads work.
- Limits (`man 2 setrlimit`) on address space, CPU time, file size and open files. One process cannot multiply them.

This file imports nothing outside the standard library.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE_BYTES = 1 << 20
FOLDER_BYTES = 16 << 20
OPEN_FILES = 64

# What the interpreter and its extension modules read, beside sys.path.
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/urandom")

# linux/sched.h, sys/mount.h
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
# linux/prctl.h
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
# These system calls are newer than libc's functions; their numbers are the same on every architecture.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT, _MOUNT_SETATTR = 444, 445, 446, 442

# The system calls that the filter refuses: (x86_64, aarch64), from the kernel's tables; None where there is no such call.
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "bpf": (321, 280),
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "unshare": (272, 97), "setns": (308, 268),
}  # fmt: skip
_CLONE, _CLONE3, _TGKILL, _PRLIMIT, _PRCTL = (56, 220), (435, 435), (234, 131), (302, 261), (157, 167)
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38
# The machine's AUDIT_ARCH of linux/audit.h, and its column above.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


class Confinement(NamedTuple):
    """Which steps hold in a process."""

    namespaces: bool
    landlock: bool
    seccomp: bool


def _call(name: str, *arguments: object) -> int:
    """Call a function of libc. Raises OSError if it fails or is missing: on macOS most are."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except AttributeError:
        raise OSError(_ENOSYS, name) from None
    result: int = function(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    with suppress(OSError):
        _call("prctl", _PDEATHSIG, 9, 0, 0, 0)


def hide_memory(hidden: bool = True) -> None:
    """Refuse processes of the same user to look into this process and its descendants (`man 5 proc`, "dumpable")."""
    with suppress(OSError):
        _call("prctl", _DUMPABLE, int(not hidden), 0, 0, 0)


def _unshare(flags: int) -> None:
    """Enter new namespaces, as the same user. Raises OSError if the kernel refuses."""
    user, group = os.geteuid(), os.getegid()
    hide_memory(False)  # a hidden process cannot write into its own /proc
    try:
        _call("unshare", _NEWUSER | flags)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    finally:
        hide_memory()


def new_processes_see_no_others() -> None:
    """Put the next process that this one starts into a PID namespace, as its first process, if the kernel allows that."""
    with suppress(OSError):
        _unshare(_NEWPID)


@cache
def readable() -> list[str]:
    """Return the paths that a confined process may read. Processes that are forked after the first call know them, too."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")  # Lambda's interpreter has its libraries there
    paths = [*_LIBRARIES, *sys.path, *libraries]
    return list(dict.fromkeys(path for path in paths if path.startswith("/") and Path(path).exists()))


def _new_root(folder: str) -> None:
    """Make a file tree with the readable paths, read-only, and an empty `/tmp`; enter it. Raises OSError.

    The tree is mounted on `folder`, for this process only.
    """
    _unshare(_NEWNS | _NEWNET | _NEWIPC)
    _call("mount", None, b"/", None, _REC | _PRIVATE, None)
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", _NOSUID | _NODEV, f"size={FOLDER_BYTES},nr_inodes=4096".encode())
    for path in map(Path, (*readable(), *_DEVICES)):
        target = Path(f"{folder}{path}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
            continue
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        _call("mount", bytes(path), bytes(target), None, _BIND | _REC, None)
        read_only = struct.pack("QQQQ", 1, 0, 0, 0)  # struct mount_attr: MOUNT_ATTR_RDONLY
        _call("syscall", _MOUNT_SETATTR, -100, bytes(target), 0x8000, read_only, len(read_only))  # AT_RECURSIVE
    Path(folder, "tmp").mkdir()
    os.chroot(folder)
    os.chdir("/tmp")  # noqa: S108 - the only folder where the process may write


def _landlock() -> None:
    """Allow reading of the readable paths, and everything in the current folder. Raises OSError."""
    version = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # how many rights of linux/landlock.h a version knows
    everything = (1 << rights) - 1
    write_file, read_file, read_dir = 1 << 1, 1 << 2, 1 << 3
    attributes = struct.pack("Q", everything)
    ruleset = _call("syscall", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    rules = [(".", everything), *((path, read_file | read_dir) for path in readable())]
    for path, allowed in [*rules, *((path, read_file | write_file) for path in _DEVICES)]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed if Path(path).is_dir() else allowed & (read_file | write_file), descriptor)
        _call("syscall", _LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(descriptor)
    _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _filter(architecture: int, column: int) -> bytes:
    """Return the filter as a program of `struct sock_filter`s (linux/filter.h).

    It reads `struct seccomp_data` (linux/seccomp.h): the call's number at 0, the architecture at 4, an argument at 16.
    """
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
    steps = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, refuse | _EPERM),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse | _EPERM),  # x32's calls have other numbers
    ]  # fmt: skip
    calls = [(numbers[column], _EPERM) for numbers in _REFUSED.values()]
    for number, error in [*calls, (_CLONE3[column], _ENOSYS)]:  # libc uses clone where clone3 is missing
        if number is not None:
            steps += [(equal, 0, 1, number), (answer, 0, 0, refuse | error)]
    for numbers, test, value, allowed in (
        (_CLONE, any_bit, _CLONE_THREAD, True),
        (_TGKILL, equal, os.getpid(), True),  # abort() and raise() of the process itself
        (_PRLIMIT, equal, 0, True),  # the process's own limits
        (_PRCTL, equal, _PDEATHSIG, False),
    ):
        met, missed = (allow, refuse | _EPERM) if allowed else (refuse | _EPERM, allow)
        steps += [
            (equal, 0, 4, numbers[column]), (load, 0, 0, 16),
            (test, 0, 1, value), (answer, 0, 0, met), (answer, 0, 0, missed),
        ]  # fmt: skip
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (answer, 0, 0, allow)])


def _seccomp() -> None:
    """Install the filter. Raises OSError, also on an architecture without a table."""
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(_ENOSYS, "seccomp")
    program = _filter(*_ARCHITECTURES[platform.machine()])
    buffer = ctypes.create_string_buffer(program, len(program))
    _call("prctl", _SECCOMP, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)), 0, 0)


def _drop_capabilities() -> None:
    """Give up root's powers for good. Raises OSError."""
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # _LINUX_CAPABILITY_VERSION_3, this process, no bits


def _done(step: Callable[..., None], *arguments: str) -> bool:
    """Return whether the kernel allows a step."""
    try:
        step(*arguments)
    except OSError:
        return False
    return True


def confine(folder: str, keep: set[int], memory: int, seconds: int) -> Confinement:
    """Confine this process, which must have one thread. The process keeps the open files `keep` and no other.

    `folder` is an empty folder; the process gets an empty one of its own as its current folder. `memory` is in bytes,
    `seconds` of CPU time.
    """
    die_with_parent()
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for descriptor in range(3, 256):
        if descriptor not in keep:
            with suppress(OSError):
                os.close(descriptor)
    namespaces = _done(_new_root, folder)
    if not namespaces:
        own = f"{folder}/{os.urandom(8).hex()}"
        Path(own).mkdir(mode=0o700)
        os.chdir(own)
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    _done(_drop_capabilities)
    landlock = _done(_landlock)
    seccomp = _done(_seccomp)
    if not seccomp:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # neither processes nor threads
    return Confinement(namespaces, landlock, seccomp)
