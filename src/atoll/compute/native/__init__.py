"""Native code: the C sources of this package, compiled on first use and cached on disk.

The name of a library is a digest of its source, flags, compiler and CPU. A library is written to a temporary folder and
then renamed, so processes can build at the same time, and later processes load the cached file.

    cache folder:  $ATOLL_CACHE, or $XDG_CACHE_HOME/atoll, or ~/.cache/atoll

Tests: tests/identities/test_native.py, tests/identities/test_numerics.py
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

from atoll.base.errors import UsageError
from atoll.compute.native.structs import STRUCTS, StructLayout, exported

if TYPE_CHECKING:
    from torch import Tensor, dtype

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_OWN = "export ATOLL_CACHE=/folder/of/your/own"
_INSTALL = "apt-get install gcc libc6-dev"
_LINK = ("-shared", "-fPIC", "-pthread")
_LOADED: list[tuple[str, ctypes.CDLL]] = []

_THREADS: ContextVar[int] = ContextVar("threads of native code", default=0)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let native code use n threads inside the block, independent of the number that torch uses.

    Idle threads of torch spin for milliseconds and occupy the cores that native code needs.

    Args:
        n: number of threads, at least 1.
    Example:
        >>> with threads(2):
        ...     threads_now(1)
        2
    """
    before = _THREADS.set(n)
    try:
        yield
    finally:
        _THREADS.reset(before)


def threads_now(otherwise: int) -> int:
    """The number of threads of native code: the number set by `threads`, or `otherwise` outside of it."""
    return _THREADS.get() or otherwise


class BuildError(Exception):
    """A library cannot be built or loaded.

    Args:
        reason: the cause, as a clause that follows "native code: ".
        write: the command that helps; may be empty.
    """

    def __init__(self, reason: str, write: str = "") -> None:
        super().__init__(reason)
        self.write = write


@lru_cache
def library(name: str, *defines: str) -> ctypes.CDLL:
    """Load the library of one C source, and build it first if it is not in the cache.

    Args:
        name: file name of the source, without its ending.
        defines: preprocessor names that are defined.
    Raises:
        BuildError: there is no compiler, it fails, or no private cache folder can be made.
        UsageError: a struct of the library differs from its declaration in Python.
    """
    built = _kept_at(name, defines)
    if not built.exists():
        _build(name, defines, built)
    try:
        loaded = ctypes.CDLL(str(built))
    except OSError as error:
        raise BuildError(f"{built} does not load ({error})", f"rm {built}") from error
    for struct, declared in STRUCTS.get(name, {}).items():
        _check_struct(struct, exported(loaded, struct), declared, built)
    _LOADED.append((name, loaded))
    return loaded


def _check_struct(struct: str, found: StructLayout | None, declared: StructLayout, built: Path) -> None:
    if found == declared:
        return
    if found is None:
        given = "does not export it"
    else:
        pairs = zip((*found.fields, "none"), (*declared.fields, "none"), strict=False)
        differ = next((f"; {a!r} instead of {b!r}" for a, b in pairs if a != b), "")
        given = f"has {len(found.fields)} fields and {found.size} bytes{differ}"
    raise UsageError(
        f"Struct {struct} in the native library {built}: the library {given}.",
        f"{len(declared.fields)} fields and {declared.size} bytes, as declared in atoll/compute/native/structs.py.",
        "C reads a struct by position, so a different layout leads to wrong addresses.",
        f"rm {built}",
    )


def release_buffers() -> None:
    """Free the memory that native code keeps for its next call.

    Each library of descent.c keeps at most 64 buffers, because new pages cost as much time as a short call. It is safe
    at any time: buffers in use are not freed.
    """
    for name, loaded in _LOADED:
        if name == "descent":
            loaded.release_buffers()


def present(name: str, *defines: str) -> ctypes.CDLL | None:
    """Load the library if it is in the cache, otherwise None: for callers that have a path of equal bits without it."""
    try:
        return _found(name, *defines)
    except BuildError:
        return None


def serving(name: str, x: Tensor) -> ctypes.CDLL | None:
    """The library for the dtype of x, if it is in the cache and x is a float32 or float64 tensor on the CPU."""
    if not x.is_cpu or not x.is_floating_point() or x.dtype.itemsize not in (4, 8):
        return None
    return present(name, *widths(x.dtype))


def widths(dtype: dtype) -> tuple[str, ...]:
    """The preprocessor names for this dtype."""
    return ("WIDE",) if dtype.itemsize == 8 else ()


@lru_cache
def _found(name: str, *defines: str) -> ctypes.CDLL:
    """The cached library. `lru_cache` stores no exception, so a missing library is looked up again."""
    if not _kept_at(name, defines).exists():
        raise BuildError("it has not been built yet")
    return library(name, *defines)


@lru_cache
def _kept_at(name: str, defines: tuple[str, ...]) -> Path:
    inputs = "\0".join((compiler()[1], *FLAGS, *defines, *_LINK, _cpu())).encode()
    return folder() / f"{name}-{hashlib.sha256(inputs + _source(name)).hexdigest()[:20]}.so"


def _source(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}.c").read_bytes()


@lru_cache
def compiler() -> tuple[str, str]:
    """Path and version line of the C compiler: $CC, or the first of cc, gcc and clang.

    Raises:
        BuildError: there is no compiler, or `--version` fails.
    """
    requested = os.environ.get("CC", "")
    found = next(
        (path for name in ((requested,) if requested else ("cc", "gcc", "clang")) if (path := shutil.which(name))), ""
    )
    if not found:
        raise BuildError(
            f"there is no C compiler{f' {requested}' if requested else ''}", "unset CC" if requested else _INSTALL
        )
    result = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{found} --version fails", "unset CC" if requested else _INSTALL)
    return found, result.stdout.splitlines()[0]


def folder() -> Path:
    """The cache folder. Only its owner may write to it, because its files are executed.

    Raises:
        BuildError: it cannot be made, or other users can write to it.
    """
    own = os.environ.get("ATOLL_CACHE")
    path = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atoll"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise BuildError(f"{path} cannot be made ({error.strerror})", _OWN) from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"other users can write to {path}, and its files are executed", _OWN)
    return path


def _build(name: str, defines: tuple[str, ...], built: Path) -> None:
    command, _ = compiler()
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        source_file, library = Path(scratch) / f"{name}.c", Path(scratch) / built.name
        source_file.write_bytes(_source(name))
        flags = (*FLAGS, *(f"-D{define}" for define in defines), *_LINK)
        result = subprocess.run(
            [command, *flags, source_file, "-o", library, "-lm"], capture_output=True, text=True, check=False
        )
        if result.returncode:
            message = (result.stderr.strip().splitlines() or ["no message"])[0]
            raise BuildError(f"{command} fails on {name}.c: {message[:200]}", _INSTALL)
        library.replace(built)


@lru_cache
def _cpu() -> str:
    """Model and instruction sets of this CPU: `-march=native` compiles for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    first = {line.partition("\t")[0].strip(): line for line in reversed(lines)}
    return "\n".join([platform.machine(), *(first[kind] for kind in kinds if kind in first)])
