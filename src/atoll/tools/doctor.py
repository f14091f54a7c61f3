"""Check this machine: versions, disk space, data sets, and the properties that bit-identical results depend on.

    atoll doctor

Tests: tests/surface/test_tools.py.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from torch import Tensor, nn

from atoll import data, models, recipes
from atoll.base.errors import AtollError
from atoll.base.random import Key, philox
from atoll.compute.compiled import load_libraries
from atoll.compute.model_state import Batch
from atoll.compute.native import BuildError, compiler, folder
from atoll.compute.task import Task
from atoll.data.named import NAMED
from atoll.plan.aggregate import exact
from atoll.training.rounds import rounds

ROOM = 1 << 30
SLOW = 5.0  # seconds for one round of digits
PHILOX = ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Args:
        name: the name of the check.
        ok: whether the check passed.
        text: the finding.
        fix: the command that fixes or improves it; may be empty if the check passed, never if it failed.
    """

    name: str
    ok: bool
    text: str
    fix: str = ""


def examine(out: str | Path = "runs") -> list[Check]:
    """Run all checks, in a few seconds. A check that raises an exception has failed.

    Args:
        out: the parent folder of run folders.
    Returns:
        the results, in order.
    Example:
        >>> [check.ok for check in examine() if check.name == "random numbers"]
        [True]
    """
    return list(run_checks(out))


def run_checks(out: str | Path = "runs") -> Iterator[Check]:
    """Run the checks of `examine` and yield each result when it is ready, so that a caller can show progress."""
    looks: list[tuple[str, Callable[[], Check]]] = [
        ("versions", _versions),
        ("processor", _processor),
        ("disk space", lambda: _room(Path(out))),
        ("data sets", _data_sets),
        ("random numbers", _random_numbers),
        ("exact sum", _exact_sum),
        ("safetensors", _safetensors),
        ("native code", _native_code),
        *((f"lanes: {name}", partial(_lanes, name)) for name in SMALL),
        ("one round", _one_round),
    ]
    for name, look in looks:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that an LSTM under vmap is slow; that is no fault
                found = look()
            yield found
        except Exception as error:
            cause = error.given if isinstance(error, AtollError) else f"{type(error).__name__}: {error}"
            yield Check(name, False, cause.splitlines()[0], "pip install --force-reinstall atoll")


def _versions() -> Check:
    """Compare the version of each required package with the lower bound of atoll's metadata."""
    found, old = [], []
    for line in requires("atoll") or []:
        parts = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)[^;]*$", line)
        if parts is None:
            continue
        name, least = parts.groups()
        try:
            now = version(name)
        except PackageNotFoundError:
            old.append(f'"{name}>={least}"')
            continue
        found.append(f"{name} {now}")
        if _numbers(now) < _numbers(least):
            old.append(f'"{name}>={least}"')
    finding = f"Python {platform.python_version()}, atoll {version('atoll')}, {', '.join(found)}"
    return Check("versions", not old, finding, f"pip install {' '.join(old)}" if old else "")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def _processor() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    uses = f"{threads} thread{'' if threads == 1 else 's'}"
    finding = f"{cores} cores, torch uses {uses}, {torch.backends.cpu.get_cpu_capability()}"
    return Check(
        "processor",
        threads <= cores,
        finding,
        f"export OMP_NUM_THREADS={cores}" if threads > cores else "",
    )


def _room(out: Path) -> Check:
    """Check that the parent of run folders is writable and that the disk has free space."""
    here = out.resolve()
    while not here.exists():
        here = here.parent
    try:
        with tempfile.NamedTemporaryFile(dir=here, prefix=".atoll-doctor-"):
            pass
    except OSError as error:
        return Check("disk space", False, f"{here} cannot be written: {error.strerror}", "atoll run --out ~/runs")
    free = shutil.disk_usage(here).free
    finding = f"{free / 2**30:.1f} GiB free in {here}"
    return Check("disk space", free >= ROOM, finding, "" if free >= ROOM else "atoll run --out ~/runs")


def _data_sets() -> Check:
    """Check that the data sets of scikit-learn load; list the other data sets that are missing."""
    here, away = [], []
    for name in sorted(NAMED):
        try:
            data.load(name)
            here.append(name)
        except AtollError:
            away.append(name)
    ok = "digits" in here
    fixes = []
    if not ok:
        fixes.append('pip install "scikit-learn>=1.4"')
    if "fashion_mnist" in away:
        fixes.append("apt-get install dataset-fashion-mnist")
    if {"mnist", "heart"} & set(away):
        fixes.append("export ATOLL_DATA=FOLDER, the folder of their files")
    finding = f"{', '.join(here) or 'none'}" + (f"; not found: {', '.join(away)}" if away else "")
    return Check("data sets", ok, finding, "; ".join(fixes))


def _random_numbers() -> Check:
    counter, key, answer = (torch.tensor(words) for words in PHILOX)
    draws = Key(7).fold("doctor").of(torch.tensor([4, 9, 2])).uniform(5)
    alone = Key(7).fold("doctor").of(torch.tensor([9])).uniform(5)
    ok = torch.equal(philox(counter, key), answer) and torch.equal(draws[1:2], alone)
    return Check(
        "random numbers",
        ok,
        "Philox matches its published test vector; a client's draws do not depend on other clients"
        if ok
        else "Philox differs from its published test vector, or a client's draws depend on other clients",
        "" if ok else _REINSTALL,
    )


_REINSTALL = 'pip install --force-reinstall "torch>=2.6"'


def _exact_sum() -> Check:
    """Check that the exact sum has the same total for every order and grouping, over 30 powers of ten."""
    key = Key(7).fold("doctor sum")
    rows = key.normal(40 * 5000).reshape(40, 5000) * 10 ** (30 * key.fold("scale").uniform(40)[:, None] - 12)
    weights = key.fold("weights").integers(40, 1000)
    totals = []
    for size in (40, 1, 7):
        order = key.fold("order", size).permutation(40)
        digits: exact.Digits = {}
        for piece in order.split(size):
            exact.add(digits, rows[piece], weights[piece])
        totals.append(exact.total(digits))
    ok = all(torch.equal(totals[0], t) for t in totals)
    finding = "the same total for every order and grouping" if ok else "the total depends on the order"
    return Check("exact sum", ok, finding, "" if ok else _REINSTALL)


def _safetensors() -> Check:
    from safetensors.torch import load, save

    tensors = {
        "a": torch.tensor([float("inf"), -0.0, 1e-45]),
        "b": torch.arange(6).reshape(2, 3),
        "c": torch.tensor([[0.1]], dtype=torch.float64),
        "d": torch.zeros(0, 3),
    }
    back = load(save(tensors))
    same = tensors.keys() == back.keys() and all(
        t.dtype == back[n].dtype and torch.equal(t, back[n]) for n, t in tensors.items()
    )
    ok = same and save(tensors) == save(dict(reversed(tensors.items())))
    finding = "tensors are read back unchanged, from equal bytes" if ok else "tensors are not read back unchanged"
    return Check("safetensors", ok, finding, "" if ok else 'pip install --force-reinstall "safetensors>=0.4.5"')


def _small(name: str, features: tuple[int, ...]) -> nn.Module:
    return models.build(name, features, 3, "classification", Key(7).fold("doctor"))


SMALL: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "mlp": ((13,), lambda: _small("mlp", (13,))),
    "cnn": ((1, 8, 8), lambda: _small("cnn", (1, 8, 8))),
    "transformer": ((6, 5), lambda: _small("transformer", (6, 5))),
    "lstm": ((6, 5), lambda: _small("lstm", (6, 5))),
    "batch norm": (
        (13,),
        lambda: nn.Sequential(nn.Linear(13, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)),
    ),
}


def _lanes(name: str) -> Check:
    """Check that a client's bits depend neither on the other clients of its batch nor on its position in it."""
    features, make = SMALL[name]
    torch_state = torch.random.get_rng_state()
    task = replace(Task.of(make(), "cross_entropy"), numerics="lanes")
    torch.random.set_rng_state(torch_state)
    draw = Key(7).fold("doctor rows").of(torch.arange(8))
    size = int(torch.tensor(features).prod())
    x = draw.normal(9 * size, torch.float32).reshape(8, 9, *features)
    y = draw.fold("y").integers(9, 3)
    theta = task.initial().theta + 0.01 * draw.fold("theta").normal(task.layout.d, torch.float32)
    whole = task.initial().lanes(8)._replace(theta=theta)

    def bits(*ids: int) -> Tensor:
        index = torch.tensor(ids)
        got = task.gradient(whole.select(index), Batch(x[index], y[index], (9,) * len(ids)), draw.select(index))
        return torch.cat((got.grad, got.buffers, got.loss[:, None]), 1)

    alone = torch.cat([bits(i) for i in range(8)])
    ok = all(
        torch.equal(bits(*ids), alone[list(ids)])
        for ids in (
            (0, 1),
            (1, 0),
            (0, 1, 2),
            (2, 0, 1),
            (5, 5, 5),
            tuple(range(8)),
            tuple(reversed(range(8))),
        )
    )
    finding = "a client's bits are equal in batches of 1, 2, 3 and 8 clients" if ok else "bits depend on other clients"
    return Check(f"lanes: {name}", ok, finding, "" if ok else "atoll run --numerics loop")


def _native_code() -> Check:
    """Check that the native code can be built. Without it, atoll uses fused layers in torch, which are slower."""
    try:
        load_libraries(torch.float32)
        return Check("native code", True, f"built by {compiler()[1]}, cached in {folder()}")
    except BuildError as why:
        return Check(
            "native code", not why.write, f"none: {why}; runs use fused numerics, and noise comes from NumPy", why.write
        )


def _one_round() -> Check:
    clients = data.load("digits").split(clients=100, by=data.Dirichlet(0.3))
    training = rounds("mlp", clients, recipes.fedavg(), rounds=3)
    training.next()
    began = time.perf_counter()
    training.next()
    spent = time.perf_counter() - began
    finding = f"{spent:.3f} s for fedavg with 100 clients of digits, {training.task.numerics} numerics"
    return Check("one round", spent < SLOW, finding, "" if spent < SLOW else "export OMP_NUM_THREADS=1")
