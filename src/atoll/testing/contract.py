"""Common code of the checks: the error, equality to the bit, and calls that must be pure.

Tests: tests/conformance/test_parts.py
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from atoll.base.errors import AtollError, UsageError, place_of
from atoll.base.grammar import parse
from atoll.base.random import SecretKey, generator_states
from atoll.plan.conflicts import undeclared
from atoll.plan.protocols import OPEN, Declared, Group, Population, RoundInfo, Tensors
from atoll.plan.registry import PARTS

T = TypeVar("T")
P = ParamSpec("P")


class Nonconformity(AtollError):
    """A part breaks the contract of its slot. The error states its behaviour, the requirement and the reason.

    Example:
        >>> from atoll.testing import check_sampler
        >>> check_sampler("Uniform(3)")
        Traceback (most recent call last):
        atoll.testing.contract.Nonconformity: 'Uniform(3)' is of type str.
        Required: a frozen dataclass.   Why: a plan is a value: it is printed, compared, hashed and saved.
    """


def require(holds: bool, given: str, required: str, why: str) -> None:
    """Raise Nonconformity unless `holds` is True."""
    if not holds:
        raise Nonconformity(given, required, why)


def conformity(check: Callable[P, None]) -> Callable[P, None]:
    """Decorate a check: every exception that a part raises becomes a Nonconformity, with the place of the error."""

    @functools.wraps(check)
    def checked(*args: P.args, **words: P.kwargs) -> None:
        try:
            check(*args, **words)
        except Nonconformity:
            raise
        except Exception as error:
            subject = "The engine" if check.__name__ == "check_engine" else f"{args[0]!r}"
            place, cause = place_of(error), error.given.rstrip(".") if isinstance(error, AtollError) else str(error)
            raise Nonconformity(
                f"{subject} raised {type(error).__name__}: {cause}.{f' It was raised in {place}.' if place else ''}",
                "no error for these arguments.",
                f"{check.__name__} uses the part as a training does.",
            ) from error

    return checked


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal to the bit: tensors of equal dtype, shape, device and bits.

    Example:
        >>> same({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])})
        False
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        equal = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        return equal and (a.device == b.device) and (a.is_meta or torch.equal(_bits(a), _bits(b)))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _bits(t: Tensor) -> Tensor:
    return t.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def copied(tree: T) -> T:
    """Copy a tree of containers, including every tensor."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), tree)  # type: ignore[no-any-return]


def row(tree: Any, k: int | slice) -> Any:
    """Select client k of K in every tensor of a tree. The first axis remains, with length 1."""
    index = slice(k, k + 1) if isinstance(k, int) else k
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t[index], tree)


def lanes(template: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Repeat the memory of one client for k clients: tensors `[k, …]`."""
    return {n: t.expand(k, *t.shape).clone() for n, t in template.items()}


def pure(subject: str, function: Callable[..., T], *given: Any) -> T:
    """Call a function of a part twice, check that it is pure, and return its result.

    A pure function depends on its arguments only and changes none of them.

    Args:
        subject: the part and the method, for the error.
        function: the function to check.
        given: the arguments of the function.
    Returns:
        The result of the first call.
    Raises:
        Nonconformity: the function changes an argument, uses a global random generator, or returns two different
            results.
    """
    before, drawn = copied(given), generator_states()
    first = copied(refused(subject, function, *given))
    require(
        same(given, before),
        f"{subject} changed its arguments.",
        "a function that leaves its arguments unchanged.",
        "the same tensors go to other clients, and they are used again if this round fails.",
    )
    require(
        generator_states() == drawn,
        f"{subject} drew from a global generator.",
        "every draw from the key.",
        "a run that is killed and resumed must draw the same numbers on every engine.",
    )
    require(
        same(function(*given), first),
        f"{subject} gave two results for the same arguments.",
        "equal bits for equal arguments.",
        "a round that is computed again, after a crash or for a replay, must give the same bits.",
    )
    return first


def same_names(subject: str, template: Mapping[str, Tensor], names: Any, lead: tuple[int, ...] = ()) -> None:
    """Refuse tensors whose names, shapes or dtypes differ from their template."""
    require(
        isinstance(names, Mapping) and names.keys() == template.keys(),
        f"{subject} gave {sorted(names) if isinstance(names, Mapping) else type(names).__name__}.",
        f"tensors named {sorted(template)}.",
        "the names of state are fixed before the first round.",
    )
    for name, first in template.items():
        tensor = names[name]
        require(
            isinstance(tensor, Tensor) and tensor.shape == (*lead, *first.shape) and tensor.dtype == first.dtype,
            f"{subject} gave {name} as {_seen(tensor)}.",
            f"{first.dtype} {[*lead, *first.shape]}.",
            "state is stored by name, with one shape and dtype from the first round to the last.",
        )


def _seen(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)


def leading(subject: str, tensors: Any, k: int, whole: bool = False) -> None:
    """Refuse tensors whose first axis does not have length k. `whole` also refuses tensors that are not integers."""
    require(
        isinstance(tensors, Mapping), f"{subject} is {type(tensors).__name__}.", "tensors by name.", "names are used."
    )
    for name, tensor in tensors.items():
        good = isinstance(tensor, Tensor) and tensor.dim() >= 1 and len(tensor) == k
        require(
            good and (not whole or not tensor.is_floating_point()),
            f"{subject}[{name!r}] is {_seen(tensor)}.",
            f"{'whole numbers' if whole else 'a tensor'} [{k}, …] for {k} clients.",
            "if a client fails, its row is removed.",
        )


def refused(subject: str, function: Callable[..., T], *given: Any) -> T:
    """Call a function of a part and return its result. Every exception becomes a Nonconformity."""
    try:
        return function(*given)
    except Nonconformity:
        raise
    except Exception as error:
        raise Nonconformity(
            f"{subject} raised {type(error).__name__}: {error}.",
            "a result.",
            "the loop calls the slot with these arguments.",
        ) from error


def on_meta(subject: str, function: Callable[..., T], *given: Any) -> T:
    """Call a function of a part with meta tensors. It must not read values or move tensors."""
    try:
        return function(*given)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise Nonconformity(
            f"{subject} failed on tensors without numbers: {str(error).splitlines()[0]}",
            "tensor operations on the device of the arguments: no .item(), no branch on a number, "
            "and draws from a shared key moved by .to(x.device).",
            "on a GPU each read of a number waits for all earlier work.",
        ) from None


@conformity
def check_value(part: Any) -> None:
    """Check that a part is a value: frozen, hashable, equal to its copy, and rebuilt by parsing its repr.

    Args:
        part: any part of a plan.
    Raises:
        Nonconformity: the part lacks one of these properties.
    Example:
        >>> from atoll.plan.sampler import Uniform
        >>> check_value(Uniform(3))
    """
    subject, why = repr(part), "a plan is a value: it is printed, compared, hashed and saved."
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        raise Nonconformity(f"{subject} is of type {type(part).__name__}.", "a frozen dataclass.", why)
    frozen = type(part).__dataclass_params__.frozen  # type: ignore[attr-defined]
    require(frozen, f"{type(part).__name__} can be changed.", "@dataclass(frozen=True).", why)
    try:
        hash(part)
    except TypeError as error:
        raise Nonconformity(
            f"{subject} cannot be hashed: {error}.", "fields that are values themselves.", why
        ) from None
    require(dataclasses.replace(part) == part, f"{subject} differs from its copy.", "equality by fields.", why)
    try:
        repeated = parse(subject, {**PARTS, **_names(part)}, trust=True)
    except UsageError as error:
        raise Nonconformity(
            f"The repr of a {type(part).__name__} cannot be read: {error.given}",
            "a constructor call of the grammar, such as the mixin atoll.base.grammar.Value gives.",
            "a run's config.toml, a flag and the wire hold a part as its text.",
        ) from error
    require(
        repeated == part,
        f"{subject} reads back as {repeated!r}.",
        "an equal part.",
        "the saved plan must be the run plan.",
    )


def _names(part: Any) -> dict[str, Callable[..., Any]]:
    """The constructors that a part's text may call: its own class and the classes of the parts that it contains."""
    names: dict[str, Callable[..., Any]] = {}
    held: list[Any] = [part]
    while held:
        value = held.pop()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names[type(value).__name__] = type(value)
            held += [getattr(value, f.name) for f in dataclasses.fields(value)]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            held += value
    return names


def known_entropy(seed: int = 0) -> SecretKey:
    """A secret key with known numbers: two keys with the same seed draw the same numbers.

    Args:
        seed: any integer.
    Example:
        >>> known_entropy(7).integers((3,), 10).equal(known_entropy(7).integers((3,), 10))
        True
    """
    return SecretKey.of_seed(seed)


def round_info(population: Population | None = None, round: int = 0, seed: int = 0) -> RoundInfo:
    """The facts of a round in which every client participates, with known entropy.

    Args:
        population: all clients; None: seven clients that hold 3, 6, …, 21 rows.
        round: the number of the round, from 0.
        seed: the seed of `known_entropy`.
    Example:
        >>> round_info().cohort_size
        7
    """
    population = population or Population(7, torch.arange(1, 8) * 3)
    chance = torch.ones((), dtype=torch.float64)
    weight = population.sizes.sum()
    return RoundInfo(round, population, population.clients, chance, known_entropy(seed), weight)


def check_declared(subject: str, declared: Mapping[str, Declared], means: Tensors, sums: Tensors) -> None:
    """Check that the means and sums of K clients match their declarations.

    Args:
        subject: the part and the method that made the contribution, for the error.
        declared: the result of `declare`: the declaration of each name.
        means: tensors `[K, length]`; the keys are the declared names of kind "mean".
        sums: tensors `[K]` or `[K, length]`; the keys are the declared names of kind "sum".
    Raises:
        Nonconformity: a name is missing or not declared, a length or the dtype of a mean differs from the declaration,
            or the Euclidean norm of a row exceeds the declared bound.
    """
    name, difference = undeclared(declared, means, sums)
    require(
        not name,
        f"{subject} gave {name}: {difference}.",
        "the names and lengths that `declare` gives.",
        "the server adds contributions by name.",
    )
    for name, tensor in {**means, **sums}.items():
        known = declared.get(name) or declared[OPEN]
        require(
            name not in declared or known.kind == "sum" or tensor.dtype == known.dtype,
            f"{subject} gave {name} in {tensor.dtype}.",
            f"{known.dtype}, as declared.",
            "the exact sum keeps more digits of float64.",
        )
        norm = float(tensor.double().reshape(len(tensor), -1).norm(dim=1).max()) if tensor.numel() else 0.0
        require(
            known.bound is None or norm <= known.bound * (1 + 1e-6),
            f"{subject} gave {name} with the norm {norm:.6g}.",
            f"at most {known.bound}, as declared.",
            "noise is scaled by the declared bound.",
        )


@dataclass
class _Threads:
    """A group of threads that stand for processes."""

    rank: int
    size: int
    barrier: threading.Barrier
    board: list[Any]

    def _exchange(self, value: T) -> list[T]:
        self.board[self.rank] = value
        self.barrier.wait()
        out = list(self.board)
        self.barrier.wait()
        return out

    def all_gather(self, tensors: Tensors) -> list[dict[str, Tensor]]:
        return self._exchange({n: t.clone() for n, t in tensors.items()})

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        each = self._exchange([t.clone() for t in tensors])
        return [torch.stack(same_tensor).sum(0).to(same_tensor[0].dtype) for same_tensor in zip(*each, strict=True)]

    def all_reduce_max(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        each = self._exchange([t.clone() for t in tensors])
        return [torch.stack(same_tensor).amax(0) for same_tensor in zip(*each, strict=True)]


def in_group(functions: Sequence[Callable[[Group], T]]) -> list[T]:
    """Run functions in parallel as the members of a group, like processes of torchrun, and return their results.

    Args:
        functions: one function for each member; it receives the group.
    Example:
        >>> in_group([lambda group: int(group.all_reduce_sum([torch.tensor(group.rank)])[0])] * 3)
        [3, 3, 3]
    """
    size = len(functions)
    barrier, board = threading.Barrier(size), [None] * size

    def member(rank: int) -> T:
        try:
            return functions[rank](_Threads(rank, size, barrier, board))
        except BaseException:
            barrier.abort()  # the other members would wait for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))
