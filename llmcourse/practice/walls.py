"""The walls around a learner's code in the grader's child process: as many as the system offers.

- `bubblewrap` (Linux, the program bwrap): processes, users, network and shared memory of its own, and a small file
  system in memory that shows only what PyTorch needs; all of it ends with the grader.
- `landlock` (Linux kernel): only these files may be read, only one folder written, no signals to other processes.
- `seccomp` (Linux kernel): only these system calls; no new process, no socket, no look at or change of another process.
- `nobody`: root without Landlock becomes the user nobody, where nobody may read what Python needs.
- `limits`: memory, processor time, size of one file, number of files.
- Python's audit hook: what it can, and all there is elsewhere. Whoever is determined gets around it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator

__all__ = ["bubblewrap", "confine", "die_with_parent", "limit", "refuse", "remove"]

MEMORY_DISK = 64 * 2**20  # bytes of the file system in memory, for all that a sheet writes
MAX_FILES = 1000  # that a sheet makes, folders and links included
_NOBODY = 65534


# --------------------------------------------------------------------------------------- bubblewrap


def bubblewrap(readable: Iterable[str] = ()) -> list[str]:
    """The command in front of a command that runs it in a sandbox with these paths; empty where there is none."""
    if not _works():
        return []
    return [*_options(), *(a for p in readable for a in ("--ro-bind-try", p, p)), "--remount-ro", "/", "--"]


@functools.cache
def _works() -> bool:
    """Whether the program is there and the kernel lets it."""
    if sys.platform != "linux" or not shutil.which("bwrap"):
        return False
    system = [a for p in ("/usr", "/lib", "/lib64", "/bin") if not os.path.islink(p) for a in ("--ro-bind-try", p, p)]
    try:
        return subprocess.run([*_options(), *system, "--", "true"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _options() -> list[str]:
    user = str(_NOBODY)
    options = ["bwrap", "--unshare-all", "--unshare-user", "--uid", user, "--gid", user, "--cap-drop", "ALL"]
    options += ["--die-with-parent", "--new-session", "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    for path in ("/bin", "/lib", "/lib64", "/sbin"):
        if os.path.islink(path):  # /lib -> usr/lib: where the dynamic loader is looked for
            options += ["--symlink", os.readlink(path), path]
    return [*options, "--dir", "/tmp", "--size", str(MEMORY_DISK), "--tmpfs", "/tmp", "--chdir", "/tmp"]


def die_with_parent() -> None:
    """Linux: this process is killed when its parent ends, however that ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)


def remove(folder: str) -> None:
    """Delete a folder, however deeply somebody nested it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:
        if os.name != "nt":
            subprocess.run(
                ["rm", "-rf", "--", folder], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
            )


# ------------------------------------------------------------------------------------------- limits


def limit(limits: dict) -> None:
    """Ask the system for the limits; what it does not know is left out (Windows: time only, kept by the grader)."""
    try:
        import resource
    except ImportError:
        return

    def at_most(what: str, n: int) -> None:
        if hasattr(resource, what):
            number = getattr(resource, what)
            hard = resource.getrlimit(number)[1]
            n = n if hard == resource.RLIM_INFINITY else min(n, hard)
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(number, (n, n))

    at_most("RLIMIT_CPU", int(limits["seconds"]) + 5)
    at_most("RLIMIT_FSIZE", int(limits["file_bytes"]))
    at_most("RLIMIT_CORE", 0)
    at_most("RLIMIT_NOFILE", 256)
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Address space: what Python and torch have mapped already, and the allowance on top.
        with open("/proc/self/statm") as f:
            mapped = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        at_most("RLIMIT_AS", mapped + int(limits["memory_bytes"]))


# --------------------------------------------------------------------------------------- audit hook

_NO_PROCESS = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen",
               "os.startfile", "pty.spawn")  # fmt: skip
_NO_OTHER = ("socket.connect", "socket.bind", "os.kill", "os.killpg", "signal.pthread_kill")
_NO_C = ("ctypes.dlopen", "ctypes.dlsym", "ctypes.cdata")


def refuse(hidden: list[str], strict: bool) -> None:
    """An audit hook, which no Python code can take away: no programs, no network, no look at the checker.

    `strict`, where the kernel does not help: no ctypes either, which is the way around the hook.
    """
    also = _NO_C if strict else ()
    hidden = [os.path.realpath(p) for p in hidden]
    made = 0

    def makes(event: str, args: tuple) -> bool:
        flags = args[2] if event == "open" and len(args) > 2 and isinstance(args[2], int) else 0
        return event in ("os.mkdir", "os.link", "os.symlink") or bool(flags & os.O_CREAT)

    def hook(event: str, args: tuple) -> None:
        if event in _NO_PROCESS:
            raise PermissionError("starting another process is not allowed in an exercise")
        if event in _NO_OTHER or event in also:
            raise PermissionError(f"{event} is not allowed in an exercise")
        if makes(event, args):
            nonlocal made
            made += 1
            if made > MAX_FILES:
                raise PermissionError(f"more than {MAX_FILES} files are not allowed in an exercise")
        if event == "import" and str(args[0]).startswith("llmcourse.practice.sheets"):
            raise ImportError("the checker cannot be imported in an exercise")
        if event in ("open", "os.listdir", "os.scandir", "os.link", "os.rename", "os.symlink") and isinstance(
            args[0], (str, bytes)
        ):
            path = os.path.realpath(os.fsdecode(args[0]))
            if any(path == h or path.startswith(h + os.sep) for h in hidden):
                raise PermissionError("this folder cannot be read in an exercise")

    sys.addaudithook(hook)
    for module, name in (("_posixsubprocess", "fork_exec"), ("_winapi", "CreateProcess")):
        with contextlib.suppress(ImportError, AttributeError):
            found = __import__(module)
            setattr(found, name, lambda *a, **k: hook("subprocess.Popen", ()))


# ------------------------------------------------------------------------------ landlock and seccomp

# The system calls that a learner's code may make: name, number on x86_64, number on aarch64 (-1: there is none).
_CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
open 2 -1, openat 257 56, close 3 57, close_range 436 436, stat 4 -1, fstat 5 80, lstat 6 -1,
newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, lseek 8 62, access 21 -1, faccessat 269 48,
faccessat2 439 439, readlink 89 -1, readlinkat 267 78, getdents 78 -1, getdents64 217 61, getcwd 79 17,
chdir 80 49, fchdir 81 50, mkdir 83 -1, mkdirat 258 34, rmdir 84 -1, unlink 87 -1, unlinkat 263 35,
rename 82 -1, renameat 264 38, renameat2 316 276, ftruncate 77 46, truncate 76 45, fsync 74 82,
fdatasync 75 83, flock 73 32, fallocate 285 47, fadvise64 221 223, copy_file_range 326 285, sendfile 40 71,
utimensat 280 88, futimesat 261 -1, umask 95 166, chmod 90 -1, fchmod 91 52, fchmodat 268 53, mmap 9 222,
mprotect 10 226, munmap 11 215, mremap 25 216, brk 12 214, madvise 28 233, mincore 27 232, msync 26 227,
membarrier 324 283, get_mempolicy 239 236, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
rt_sigpending 127 136, rt_sigtimedwait 128 137, sigaltstack 131 132, restart_syscall 219 128, exit 60 93,
exit_group 231 94, wait4 61 260, waitid 247 95, futex 202 98, set_robust_list 273 99, get_robust_list 274 100,
set_tid_address 218 96, rseq 334 293, arch_prctl 158 -1, sched_yield 24 124, sched_getaffinity 204 123,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125,
sched_get_priority_min 147 126, getpriority 140 141, getcpu 309 168, select 23 -1, pselect6 270 72, poll 7 -1,
ppoll 271 73, epoll_create 213 -1, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -1,
epoll_pwait 281 22, eventfd2 290 19, pipe 22 -1, pipe2 293 59, dup 32 23, dup2 33 -1, dup3 292 24,
sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, getsockopt 55 209, getsockname 51 204,
getpeername 52 205, shutdown 48 210, nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113,
clock_getres 229 114, gettimeofday 96 169, time 201 -1, getitimer 36 102, setitimer 38 103, alarm 37 -1,
pause 34 -1, times 100 153, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getpgrp 111 -1,
getpgid 121 155, getsid 124 156, capget 125 90, getrlimit 97 163, getrusage 98 165, sysinfo 99 179,
uname 63 160, getrandom 318 278, symlink 88 -1, symlinkat 266 36, link 86 -1, linkat 265 37, getxattr 191 8,
lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13
"""
# These only with one of these values of one argument: name, numbers, which argument, values.
_CALLS_WITH = (
    ("fcntl", 72, 25, 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # no F_SETOWN, F_SETSIG, F_NOTIFY: they send signals
    (
        "ioctl",
        16,
        29,
        1,
        (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451),
    ),  # is it a terminal, how much is there, close on exec
    ("prctl", 157, 167, 0, (15, 16, 0x53564D41)),  # names
    ("prlimit64", 302, 261, 0, (0,)),  # its own limits
    ("socketpair", 53, 199, 0, (1,)),  # an event loop talks to itself
)
_CLONE, _CLONE3 = (56, 220), 435
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def confine(readable: Iterable[str], listable: Iterable[str], writable: Iterable[str]) -> list[str]:
    """Use what the Linux kernel offers. Returns the names of what is in force.

    Args:
        readable: files and folders that may be read.
        listable: folders of which only the names inside may be read (Python's import looks there).
        writable: folders in which anything may be done.
    """
    if sys.platform != "linux":
        return []
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # no new privileges: the condition for both
        return []
    done = ["landlock"] if _landlock(libc, readable, listable, writable) else []
    if not done and _give_up_root(writable):
        done = ["nobody"]
    return [*done, "seccomp"] if _seccomp(libc) else done


def _give_up_root(writable: Iterable[str]) -> bool:
    """Where nothing else stands between a learner's code and root's files: go on as nobody, for good.

    Only if nobody may read Python and its packages; otherwise the next import would fail.
    """
    if os.geteuid() != 0:
        return False
    needed = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if os.path.isdir(p)}
    above = {parent for p in needed for parent in _parents(p)}
    if not all(os.stat(p).st_mode & 0o5 == 0o5 for p in needed) or not all(os.stat(p).st_mode & 1 for p in above):
        return False
    for path in writable:
        if os.path.isdir(path):
            os.chown(path, _NOBODY, _NOBODY)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    return True


def _parents(path: str) -> Iterator[str]:
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        yield path


def _landlock(libc, readable: Iterable[str], listable: Iterable[str], writable: Iterable[str]) -> bool:
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    read, on_file = 0b1101, 0b111 | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    # files; TCP (version 4); sockets by name and signals to processes outside (version 6)
    attributes = struct.pack("<QQQ", files, 0b11, 0b11)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(444, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    for paths, allowed in ((readable, read), (listable, 0b1000), (writable, files)):
        for path in paths:
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
                rights = allowed if os.path.isdir(path) else allowed & on_file
                libc.syscall(445, ruleset, 1, struct.pack("<Qi", rights, handle), 0)
                os.close(handle)
    in_force = libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return in_force


def _program(machine: str) -> bytes:
    """The filter of system calls, as the kernel reads it: all that is not allowed fails with "not permitted"."""
    column = list(_AUDIT_ARCH).index(machine)
    op = lambda code, k, yes=0, no=0: struct.pack("<HBBI", code, yes, no, k)
    LOAD, EQ, GE, SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
    ALLOW, NOT_PERMITTED, UNKNOWN = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
    numbers = [int(line.split()[1 + column]) for line in _CALLS.replace("\n", " ").split(",")]
    out = [op(LOAD, 4), op(EQ, _AUDIT_ARCH[machine], 1, 0), op(RETURN, NOT_PERMITTED), op(LOAD, 0)]
    out += [op(GE, 0x40000000, 0, 1), op(RETURN, NOT_PERMITTED)]  # the second numbering of x86
    for number in sorted({n for n in numbers if n >= 0}):
        out += [op(EQ, number, 0, 1), op(RETURN, ALLOW)]
    for _, *number, argument, values in _CALLS_WITH:
        out += [op(EQ, number[column], 0, 2 * len(values) + 2), op(LOAD, 16 + 8 * argument)]
        out += [piece for v in values for piece in (op(EQ, v, 0, 1), op(RETURN, ALLOW))]
        out += [op(RETURN, NOT_PERMITTED)]
    # a new thread, but no new process
    out += [
        op(EQ, _CLONE[column], 0, 4),
        op(LOAD, 16),
        op(SET, 0x10000, 1, 0),
        op(RETURN, NOT_PERMITTED),
        op(RETURN, ALLOW),
    ]
    # what is newer than the list: the C library then takes an older call
    out += [op(EQ, _CLONE3, 0, 1), op(RETURN, UNKNOWN), op(GE, 440, 0, 1), op(RETURN, UNKNOWN)]
    return b"".join([*out, op(RETURN, NOT_PERMITTED)])


def _seccomp(libc) -> bool:
    import ctypes
    import platform

    if platform.machine() not in _AUDIT_ARCH:
        return False
    program = _program(platform.machine())
    code = ctypes.create_string_buffer(program)
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    return libc.prctl(22, 2, fprog, 0, 0) == 0
