"""A wrong clock for one process and its children, by LD_PRELOAD on Linux."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HOUR = 3600
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static time_t offset(void) { return atol(getenv("CLOCK_OFFSET")); }

int clock_gettime(clockid_t id, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += offset();
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (result) *result = exact.tv_sec;
    return exact.tv_sec;
}

/* It waits until a moment of the kernel's clock, which the caller took from this one. */
int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    int (*real)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec exact = {until->tv_sec - offset(), until->tv_nsec};
    return real(semaphore, &exact);
}
"""
LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


def shifted(folder: Path, seconds: int) -> dict[str, str] | None:
    """Return environment variables that shift a process's clock, or None if that is impossible.

    It needs a C compiler or libfaketime.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is not None:
        library, source = folder / "clock.so", folder / "clock.c"
        if not library.exists():
            source.write_text(SHIM)
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"],
                check=True,
            )
        return {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(seconds)}
    for place in LIBRARIES:
        for library in Path(place).glob("**/faketime/libfaketime.so.1"):
            return {
                "LD_PRELOAD": str(library),
                "FAKETIME": f"{seconds:+d}s",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
    return None
