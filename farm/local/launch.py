"""Turn this process into another program, which ends when the process that started it ends.

Run it as a script, by path and with `python -I -S`, so it imports only the standard library:
`launch.py PARENT SIGNAL USER ARGV…`, for example `launch.py 4711 9 -1 /usr/bin/sleep 60`. PARENT is
the process ID of the starter. SIGNAL is sent by the kernel when the starter ends. USER is the user
ID to run as, or -1 to keep the current one.

A separate program is safe in a process with threads; code between fork and exec is not.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import sys

# From linux/prctl.h and linux/capability.h.
PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAPABILITY_VERSION_3 = 0x20080522

CANNOT_START = 127


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def main() -> None:
    """Tie this process to its parent, change to the user, and run the program."""
    parent, death_signal, user = (int(word) for word in sys.argv[1:4])
    argv = sys.argv[4:]
    if user >= 0:
        become(user, argv[0])
    # After the change of user, which would clear it.
    if sys.platform == "linux":
        _call("prctl", PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(CANNOT_START)
    os.execv(argv[0], argv)  # noqa: S606  no shell on purpose


def become(user: int, program: str) -> None:
    """Change to `user`, and stay able to reach `program` and the working folder.

    Both may be below a folder that the user cannot enter, for example root's home. The process then
    keeps only the right to pass through folders, so that folder stays closed to others.
    """
    linux = sys.platform == "linux"
    if linux:
        _call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    group = pwd.getpwuid(user).pw_gid
    os.setgid(group)
    os.setuid(user)
    here = os.getcwd()  # noqa: PTH109  pathlib would double the start-up time
    if not linux or all(os.access(path, os.X_OK) for path in (program, here)):
        return
    passing = _passing_capability()
    _set_capabilities(1 << passing)
    _call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, passing, 0, 0)


def _passing_capability() -> int:
    capabilities = (_Capabilities * 2)()
    header = _Header(CAPABILITY_VERSION_3, 0)
    _call("capget", ctypes.byref(header), ctypes.byref(capabilities))
    for capability in (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE):
        if capabilities[0].permitted & 1 << capability:
            return capability
    sys.exit("This container's root may not enter the folder. Choose another one with --data.")


def _set_capabilities(bits: int) -> None:
    capabilities = (_Capabilities * 2)(_Capabilities(bits, bits, bits), _Capabilities(0, 0, 0))
    header = _Header(CAPABILITY_VERSION_3, 0)
    _call("capset", ctypes.byref(header), ctypes.byref(capabilities))


def _call(function: str, *args: object) -> None:
    words = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args]
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


if __name__ == "__main__":
    main()
