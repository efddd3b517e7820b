"""Clocks that are wrong: environments under which programs see another time than the machine has."""

import shutil
import subprocess
from pathlib import Path

_PYTHON = """
import time

_real, _real_ns = time.time, time.time_ns
time.time = lambda: _real() + {seconds}
time.time_ns = lambda: _real_ns() + {seconds} * 10**9
"""

_LIBC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, at);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += SECONDS;
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""

can_compile = shutil.which("cc") is not None


def in_python(directory: Path, seconds: int) -> dict[str, str]:
    """For Python's own code; needs nothing, but leaves Envoy and TLS libraries with the right time."""
    (directory / "sitecustomize.py").write_text(_PYTHON.format(seconds=seconds))
    return {"PYTHONPATH": str(directory)}


def everywhere(directory: Path, seconds: int) -> dict[str, str]:
    """For the program and all that it starts, Envoy included: what they ask the C library is answered with another time."""
    library = directory / "skew.so"
    command = ["cc", "-shared", "-fPIC", f"-DSECONDS={seconds}", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=_LIBC, text=True, check=True)
    return {"LD_PRELOAD": str(library)}
