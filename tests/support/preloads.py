"""Libraries that a program is started with: a disk that can be slow, a clock that can be stepped.

A file controls each of them, so that a test can change it while the program runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from service.runtime.embedded_redis import find_server

# Debian's package `libfaketime`, on any architecture.
LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
SLOW_DISK_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static void wait_as_configured(void) {
    char milliseconds[16] = {0};
    int file = open(getenv("SLOW_DISK_FILE"), O_RDONLY);
    if (file < 0) return;
    ssize_t size = read(file, milliseconds, sizeof milliseconds - 1);
    close(file);
    long wait = size > 0 ? atol(milliseconds) : 0;
    struct timespec time = {wait / 1000, wait % 1000 * 1000000};
    nanosleep(&time, NULL);
}

int fdatasync(int file) {
    wait_as_configured();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file);
}

int fsync(int file) {
    wait_as_configured();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
"""


class Preload(Protocol):
    """A library for LD_PRELOAD, and the variables that it reads."""

    shared_object: Path
    variables: dict[str, str]


class SlowDisk:
    """Makes each fsync() and fdatasync() of a program last longer."""

    def __init__(self, directory: Path) -> None:
        self.shared_object = directory / "slow_disk.so"
        self._file = directory / "slow_disk.milliseconds"
        self.variables = {"SLOW_DISK_FILE": str(self._file)}
        self.delay(0)
        made = str(self.shared_object)
        compiler = ["gcc", "-shared", "-fPIC", "-o", made, "-x", "c", "-", "-ldl"]
        subprocess.run(compiler, input=SLOW_DISK_SOURCE.encode(), check=True)

    @staticmethod
    def missing() -> str:
        """Why it is not available; empty if it is."""
        return "" if shutil.which("gcc") else "gcc is not installed"

    def delay(self, seconds: float) -> None:
        """Let each call from now on last at least *seconds*."""
        _replace(self._file, f"{seconds * 1000:.0f}")


class Clock:
    """Steps the wall clock of a program; its monotonic clock goes on."""

    def __init__(self, directory: Path) -> None:
        self.shared_object = LIBRARIES[0]
        self._file = directory / "clock.step"
        self.variables = {
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",
        }
        self.step(0)

    @staticmethod
    def missing() -> str:
        """Why it is not available; empty if it is."""
        return "" if LIBRARIES else "libfaketime is not installed"

    def step(self, seconds: float) -> None:
        """Let the clock be *seconds* ahead of the true time from now on."""
        _replace(self._file, f"{seconds:+.0f}")


def redis_with(loaded: Sequence[Preload], directory: Path) -> Path:
    """Return an executable that starts the embedded Redis with these libraries loaded.

    Whatever server is under test: Debian's redis-server has an allocator that libfaketime cannot be
    loaded beside.
    """
    return launcher(directory, find_server({**os.environ, "REDIS_SERVER": ""}), loaded)


def launcher(directory: Path, program: Path, loaded: Sequence[Preload]) -> Path:
    """Return an executable that starts *program* with these libraries loaded."""
    variables = {"LD_PRELOAD": ":".join(str(one.shared_object) for one in loaded)}
    for one in loaded:
        variables |= one.variables
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    made = directory / "launcher"
    made.write_text("\n".join(["#!/bin/sh", *lines, f'exec {shlex.quote(str(program))} "$@"\n']))
    made.chmod(0o700)
    return made


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one."""
    made = path.with_suffix(".new")
    made.write_text(text)
    made.replace(path)
