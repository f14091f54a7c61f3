"""Native code: C sources of this package, built by the machine's own compiler when first asked for, and kept.

A library is named by what went into it: the source, the flags, the compiler and the kind of CPU. It is written beside
and moved into place, so processes that build at the same time do no harm, and nothing is built twice.

    $ATOLL_CACHE, or $XDG_CACHE_HOME/atoll, or ~/.cache/atoll
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, dtype

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_OWN = "export ATOLL_CACHE=/folder/of/your/own"
_INSTALL = "apt-get install gcc libc6-dev"
_LINK = ("-shared", "-fPIC", "-pthread")


_THREADS: ContextVar[int] = ContextVar("threads of native code", default=0)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let native code use n threads for a while, whatever torch uses.

    Threads of torch's that have nothing to do go on spinning for milliseconds, on the cores that ours would need.
    """
    before = _THREADS.set(n)
    try:
        yield
    finally:
        _THREADS.reset(before)


def threads_now(otherwise: int) -> int:
    """How many threads native code uses; `otherwise` where nobody has said."""
    return _THREADS.get() or otherwise


class Unbuilt(Exception):
    """Why there is no library, in words that follow "native code: "; `write` is the command that helps, if one does."""

    def __init__(self, reason: str, write: str = "") -> None:
        super().__init__(reason)
        self.write = write


@lru_cache
def library(name: str, *defines: str) -> ctypes.CDLL:
    """The library of one C source, built where it is not there yet.

    Args:
        name: of the source, without its ending.
        defines: names that it is built with.
    Raises:
        Unbuilt: no compiler, one that fails, or no folder of one's own to keep the library in.
    """
    built = _kept_at(name, defines)
    if not built.exists():
        _build(name, defines, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise Unbuilt(f"{built} does not load ({error})", f"rm {built}") from error


def present(name: str, *defines: str) -> ctypes.CDLL | None:
    """The library, where it has been built before; for what comes to the same bits without it."""
    try:
        return _found(name, *defines)
    except Unbuilt:
        return None


def serving(name: str, x: Tensor) -> ctypes.CDLL | None:
    """The library for numbers like these, single or double, where it has been built and they are in its reach."""
    if not x.is_cpu or not x.is_floating_point() or x.dtype.itemsize not in (4, 8):
        return None
    return present(name, *widths(x.dtype))


def widths(dtype: dtype) -> tuple[str, ...]:
    """What a source is built with for numbers of this type."""
    return ("WIDE",) if dtype.itemsize == 8 else ()


@lru_cache
def _found(name: str, *defines: str) -> ctypes.CDLL:
    """The library that is there; whether it is, is looked up until it is."""
    if not _kept_at(name, defines).exists():
        raise Unbuilt("it has not been built yet")
    return library(name, *defines)


@lru_cache
def _kept_at(name: str, defines: tuple[str, ...]) -> Path:
    told = "\0".join((compiler()[1], *FLAGS, *defines, *_LINK, _cpu())).encode()
    return folder() / f"{name}-{hashlib.sha256(told + _source(name)).hexdigest()[:20]}.so"


def _source(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}.c").read_bytes()


@lru_cache
def compiler() -> tuple[str, str]:
    """The C compiler, $CC or cc, gcc or clang, and what it says of its version.

    Raises:
        Unbuilt: there is none.
    """
    asked = os.environ.get("CC", "")
    found = next((path for name in ((asked,) if asked else ("cc", "gcc", "clang")) if (path := shutil.which(name))), "")
    if not found:
        raise Unbuilt(f"there is no C compiler{f' {asked}' if asked else ''}", "unset CC" if asked else _INSTALL)
    got = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    if got.returncode:
        raise Unbuilt(f"{found} --version fails", "unset CC" if asked else _INSTALL)
    return found, got.stdout.splitlines()[0]


def folder() -> Path:
    """Where libraries are kept: a folder that nobody else can write to, since what lies there is run.

    Raises:
        Unbuilt: it cannot be made, or it is somebody else's.
    """
    own = os.environ.get("ATOLL_CACHE")
    path = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atoll"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise Unbuilt(f"{path} cannot be made ({error.strerror})", _OWN) from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Unbuilt(f"others can write to {path}, and what lies there is run", _OWN)
    return path


def _build(name: str, defines: tuple[str, ...], built: Path) -> None:
    command, _ = compiler()
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        text, made = Path(scratch) / f"{name}.c", Path(scratch) / built.name
        text.write_bytes(_source(name))
        flags = (*FLAGS, *(f"-D{define}" for define in defines), *_LINK)
        got = subprocess.run([command, *flags, text, "-o", made, "-lm"], capture_output=True, text=True, check=False)
        if got.returncode:
            said = (got.stderr.strip().splitlines() or ["nothing"])[0]
            raise Unbuilt(f"{command} fails on {name}.c and says: {said[:200]}", _INSTALL)
        made.replace(built)


@lru_cache
def _cpu() -> str:
    """The kind of this CPU, which `-march=native` builds for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    first = {line.partition("\t")[0].strip(): line for line in reversed(lines)}
    return "\n".join([platform.machine(), *(first[kind] for kind in kinds if kind in first)])
