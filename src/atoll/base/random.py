"""Keyed randomness: every draw is a pure function of (seed, round, client, purpose).

Two counter-based generators use integer tensor operations only. A client's draw therefore has the same bits on
every engine, for any number of clients in the call, and at any position among them:

    mix64       a 64-bit finaliser for permutations, coin flips and dropout: one multiply-xor chain per number
    Philox      Philox4x32-10 for uniform and normal numbers: slower, with better statistical quality

These generators give no privacy and no security. Noise for privacy comes from a `SecretKey`, whose numbers follow from
a secret of the operating system instead of the seed.

Tests: tests/golden/test_rng.py, tests/identities/test_order.py, tests/identities/test_entropy.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import random
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from atoll.base.entropy import SECRET_BYTES, Keystream
from atoll.base.errors import UsageError

_U64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U32 = 0xFFFFFFFF
_FEW = 64  # for at most this count of numbers, Python integers are faster than NumPy
_MOST = 1 << 62  # the integers below this number are equally likely values of a word
_SHORT = 1 << 14  # for at most this count of words, NumPy or a dictionary is faster than torch


def _signed(word: int) -> int:
    """Return the two's-complement value of an unsigned 64-bit word: torch has no arithmetic on uint64."""
    word &= _U64
    return word - (1 << 64) if word >> 63 else word


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift int64 words right and fill with zeros; torch's own shift keeps the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def mix64(x: Tensor) -> Tensor:
    """Scramble 64-bit words by a bijection: the finaliser of SplitMix64.

    z ← (x ⊕ x≫30)·M₁ ; z ← (z ⊕ z≫27)·M₂ ; z ⊕ z≫31   (mod 2⁶⁴)

    Args:
        x: int64 tensor of any shape, interpreted as unsigned words.
    Returns:
        int64 tensor of the same shape.
    Example:
        >>> hex(mix64(torch.tensor([1])).item() & (2**64 - 1))
        '0x5692161d100b05e5'

    Reference: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    x = stir64(x)
    return _shift(x, 31).bitwise_xor_(x)


def _mix64(x: Tensor) -> Tensor:
    """Compute `mix64` outside of transforms such as vmap, in which a tensor has no memory of its own."""
    if x.is_cpu and x.dim() and x.numel() <= _SHORT:  # same words; a NumPy operation takes a fifth of torch's time
        words = x.numpy().view(np.uint64)
        for by, factor in ((30, _M1), (27, _M2)):
            words = words ^ (words >> np.uint64(by))
            words *= np.uint64(factor)
        words ^= words >> np.uint64(31)
        return torch.from_numpy(words.view(np.int64))
    return mix64(x)


def stir64(x: Tensor) -> Tensor:
    """Compute `mix64` without its last shift. The upper 31 bits are equal, because that shift changes the lower 33.

    Args:
        x: int64 tensor of any shape, interpreted as unsigned words.
    Returns:
        int64 tensor of the same shape.
    Example:
        >>> x = torch.arange(3)
        >>> torch.equal(stir64(x) >> 33, mix64(x) >> 33)
        True
    """
    # Everything except the shifts is in place: for a long draw, new memory would cost more than the arithmetic.
    for by, factor in ((30, _M1), (27, _M2)):
        x = _shift(x, by).bitwise_xor_(x).mul_(_signed(factor))
    return x


def _mix(x: int) -> int:
    """Compute `mix64` of a Python integer."""
    x &= _U64
    x = (x ^ (x >> 30)) * _M1 & _U64
    x = (x ^ (x >> 27)) * _M2 & _U64
    return x ^ (x >> 31)


def philox(counter: Tensor, key: Tensor, rounds: int = 10) -> Tensor:
    """Compute Philox4x32: four 32-bit words for each counter block under a 64-bit key.

    Args:
        counter: int64 `[..., 4]`, words in [0, 2³²).
        key: int64 `[..., 2]`, words in [0, 2³²); leading axes broadcast with the counter's.
        rounds: number of rounds; 10 is the published strength.
    Returns:
        int64 `[..., 4]`, words in [0, 2³²).
    Example:
        >>> philox(torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)).tolist()
        [1713891541, 3781805453, 3159862348, 2600524760]

    Reference: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    # Compute the keys of all rounds together: the time of a short draw depends on the number of operations.
    steps = torch.tensor([(r * 0x9E3779B9, r * 0xBB67AE85) for r in range(rounds)], device=key.device)
    keys = (key[..., None, :] + steps) & _U32
    if counter.is_cpu and counter.numel() <= _SHORT:  # same words; a NumPy operation takes a fifth of torch's time
        with np.errstate(over="ignore"):
            words = _rounds(np.moveaxis(counter.numpy(), -1, 0), np.moveaxis(keys.numpy(), (-2, -1), (0, 1)))
        return torch.from_numpy(np.stack(words, -1))
    return torch.stack(_rounds(counter.unbind(-1), [k.unbind(-1) for k in keys.unbind(-2)]), -1)


def _rounds(words: Any, keys: Any) -> Any:
    c0, c1, c2, c3 = words
    for k0, k1 in keys:
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _U32) ^ c1 ^ k0,
            p1 & _U32,
            ((p0 >> 32) & _U32) ^ c3 ^ k1,
            p0 & _U32,
        )
    return c0, c1, c2, c3


def _philox(block: Any, word: int) -> tuple[Any, Any, Any, Any]:
    """Compute `philox` of one block, a Python integer, or of uint64 blocks `[n]` under a key of one 64-bit word."""
    c0, c1, c2, c3, k0, k1 = block & _U32, block >> 32, 0, 0, word & _U32, word >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _U32, (p0 >> 32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = k0 + 0x9E3779B9 & _U32, k1 + 0xBB67AE85 & _U32
    return c0, c1, c2, c3


def _word(data: int | str) -> int:
    return _name(data) if isinstance(data, str) else data & _U64


@lru_cache(4096)
def _name(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Key:
    """The input of a draw: seed, purpose, round, and optionally client ids.

    A key is immutable: `fold` returns a new key, and drawing does not change the key. A key with clients draws one
    row per client, `[K, n]`; a key without clients draws one row, `[n]`. A client's row depends only on its id, not
    on the other clients of the key.

    Args:
        seed: any integer.
        path: the folded values, as 64-bit words, in order.
        clients: int64 `[K]` ids, or None for a draw shared by all clients.
        secret: the secret of the round, from which `entropy` draws; empty: there is none.
    Example:
        >>> key = Key(7).fold("order", 3)
        >>> both = key.of(torch.tensor([4, 9])).uniform(2)
        >>> torch.equal(both[1], key.of(torch.tensor([9])).uniform(2)[0])
        True
    """

    seed: int
    path: tuple[int, ...] = ()
    clients: Tensor | None = field(default=None, compare=False)
    secret: bytes = field(default=b"", compare=False, repr=False)

    @property
    def entropy(self) -> SecretKey:
        """The key with the same path and clients whose numbers follow from the secret of the round.

        Raises:
            UsageError: the round has no secret, because no part of the plan declares `uses_entropy`.
        """
        if not self.secret:
            raise UsageError(
                "A draw from the entropy of a round that has none.",
                "a part with uses_entropy = True.",
                "the secret of a round is read only for a part that declares its use.",
            )
        return SecretKey(self.seed, self.path, self.clients, self.secret)

    def fold(self, *data: int | str) -> Self:
        """Return a new key with purpose names or indices folded in, in order."""
        return type(self)(self.seed, (*self.path, *map(_word, data)), self.clients, self.secret)

    def of(self, clients: Tensor, *also: Tensor) -> Self:
        """Return this key for the clients with ids int64 `[K]`; each of `also`, int64 `[K]`, is mixed into the ids."""
        for more in also:
            clients = _mix64(clients + _signed(_GOLDEN)) ^ more
        return type(self)(self.seed, self.path, clients, self.secret)

    def starts(self, clients: Tensor, repeats: Tensor) -> Self:
        """The same key for starts of clients. The first start of a client in a round draws as `of(clients)` does.

        A further start draws other numbers. They depend on the client and on the repeat, not on the number of clients.

        Args:
            clients: client ids, int64 `[K]`.
            repeats: 0 for the first start of a client in a round, then 1, 2, …; int64 `[K]`.
        Example:
            >>> ids, key = torch.tensor([4, 4]), Key(7)
            >>> first, second = key.starts(ids, torch.tensor([0, 1])).uniform(1)
            >>> bool(first == key.of(ids).uniform(1)[0]), bool(first == second)
            (True, False)
        """
        if not bool(repeats.any()):
            return self.of(clients)
        further = _mix64(_mix64(clients + _signed(_GOLDEN)) ^ repeats)
        return self.of(torch.where(repeats > 0, further, clients))

    def select(self, index: Tensor | slice) -> Self:
        """Return this key for some of its clients, by position; a shared key is returned unchanged."""
        return self if self.clients is None else self.of(self.clients[index])

    def to(self, device: torch.device) -> Self:
        """Return this key with the client ids on a device; a shared key draws on the host and is returned unchanged."""
        return self if self.clients is None else self.of(self.clients.to(device))

    def only(self, k: int) -> Self:
        """Return a shared key for the k-th client only, to seed a generator that has no per-client draws."""
        return self.fold(k) if self.clients is None else self.shared().fold(int(self.clients[k]))

    def shared(self) -> Self:
        """Return this key without its clients: one draw for all of them."""
        return type(self)(self.seed, self.path, None, self.secret)

    def word(self) -> int:
        """Return the key without its clients as one unsigned 64-bit word."""
        state = _mix(self.seed ^ _GOLDEN)
        for step in self.path:
            state = _mix((state + _GOLDEN & _U64) ^ _mix(step + _GOLDEN))
        return state

    def state(self) -> Tensor:
        """Return the key as int64 words: `[K]` with clients, `[]` without."""
        word = _signed(self.word())
        if self.clients is None:
            return torch.tensor(word, dtype=torch.int64)
        return _mix64(_mix64(self.clients + _signed(_GOLDEN)) ^ word)

    def hash(self, n: int) -> Tensor:
        """Draw n 64-bit words by `mix64`, int64 `[..., n]`; faster than `bits`."""
        state = self.state()
        index = torch.arange(n, device=state.device)
        return _mix64(state[..., None] + (index + 1) * _signed(_GOLDEN))

    def bits(self, n: int) -> Tensor:
        """Draw n 32-bit words by Philox, int64 `[..., n]` in [0, 2³²)."""
        if self.clients is None and n <= _SHORT:
            word, blocks = self.word(), -(-n // 4)
            if n <= _FEW:
                return torch.tensor([c for block in range(blocks) for c in _philox(block, word)], dtype=torch.int64)[:n]
            words = np.stack(_philox(np.arange(blocks, dtype=np.uint64), word), -1).astype(np.int64)
            return torch.from_numpy(words).flatten()[:n]
        state = self.state()
        key = torch.stack((state & _U32, _shift(state, 32)), -1)[..., None, :]
        block = torch.arange(-(-n // 4), device=state.device)
        nil = torch.zeros_like(block)
        counter = torch.stack((block & _U32, block >> 32, nil, nil), -1)
        return philox(counter, key).flatten(-2)[..., :n]

    def uniform(self, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw n numbers uniform in [0, 1), `[..., n]`: 53 random bits in float64, 24 in float32."""
        if dtype == torch.float32:
            return (self.bits(n) >> 8).to(dtype) * 2.0**-24
        hi, lo = self.bits(2 * n).unflatten(-1, (n, 2)).unbind(-1)
        word: Tensor = ((hi >> 5) << 26) + (lo >> 6)
        return (word.to(torch.float64) * 2.0**-53).to(dtype)

    def normal(self, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw n standard normal numbers, `[..., n]`, by Box–Muller in float64."""
        half = -(-n // 2)
        u, v = self.uniform(2 * half).unflatten(-1, (half, 2)).unbind(-1)
        radius, angle = torch.sqrt(-2.0 * torch.log1p(-u)), 2.0 * math.pi * v
        pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)
        return pair.flatten(-2)[..., :n].to(dtype)

    def integers(self, n: int, high: int) -> Tensor:
        """Draw n integers uniform in [0, high), int64 `[..., n]`; high ≤ 2⁵³ (bias below high/2⁵³)."""
        return (self.uniform(n) * high).long().clamp_(max=high - 1)

    def permutation(self, n: int) -> Tensor:
        """Draw a permutation of 0 … n−1, int64 `[..., n]`, uniform up to ties of 64-bit words."""
        return torch.argsort(self.hash(n), dim=-1, stable=True)

    def permutations(self, sizes: Tensor, width: int) -> Tensor:
        """Draw for each client k a permutation of 0 … sizes[k]−1, followed by sizes[k] … width−1, int64 `[K, width]`.

        The first sizes[k] entries of row k equal `permutation(sizes[k])` of a key with only that client.
        """
        words = self.hash(width)
        index = torch.arange(width, device=words.device)
        return torch.argsort(words.masked_fill(index >= sizes[:, None], 2**63 - 1), dim=-1, stable=True)

    def distinct(self, n: int, high: int) -> Tensor:
        """Draw n distinct integers of [0, high), int64 `[n]`, in random order; the work grows with n, not with high."""
        if 4 * n >= high:
            return self.permutation(high)[:n]
        found = torch.empty(0, dtype=torch.int64)
        for attempt in range(64):
            draw = torch.cat((found, self.fold("distinct", attempt).integers(2 * n + 16, high)))
            if len(draw) <= _SHORT:
                found = torch.tensor(list(dict.fromkeys(draw.tolist())))
            else:
                values, inverse = torch.unique(draw, return_inverse=True)
                first = torch.full_like(values, len(draw)).scatter_reduce_(0, inverse, torch.arange(len(draw)), "amin")
                found = draw[first.sort().values]
            if len(found) >= n:
                break
        return found[:n]

    def torch_seed(self) -> int:
        """Return a seed in [0, 2⁶³) for a generator of torch, numpy or the user."""
        return self.word() >> 1


_Bytes = bytes  # in the class below, `bytes` is a method


class SecretKey(Key):
    """A key whose numbers follow from a secret of 32 bytes, and not from the seed: for noise, and for secret cohorts.

    Each path and each client has its own stream of AES-256-CTR. As for every key, a draw does not change the key, so
    two equal draws give equal numbers: fold a name for each draw. The secret is not compared and not shown.

    Args:
        seed, path, clients: as for `Key`; the numbers do not depend on the seed.
        secret: 32 bytes.
    Example:
        >>> key = SecretKey.of_seed(7)
        >>> key.normal((2, 3)).shape, key.fold("a").bytes(4) == key.fold("b").bytes(4)
        (torch.Size([2, 3]), False)
    """

    @classmethod
    def of_seed(cls, seed: int) -> SecretKey:
        """A key that follows from a seed: it protects nothing, and serves tests and public data."""
        return cls(seed, (), None, hashlib.sha256(f"atoll/entropy/v1/seed/{seed}".encode()).digest())

    def round_secret(self, round: int) -> _Bytes:
        """The 32 secret bytes of a round, so that the key can replace the operating system as a source."""
        return self.fold("secret of a round", round).bytes(SECRET_BYTES)

    def bytes(self, n: int) -> _Bytes:
        """The first n bytes of the stream of this key, without its clients."""
        return self.keystream().read(n)

    def keystream(self, client: _Bytes = b"") -> Keystream:
        """The stream of this key from its start: without its clients, or of one client."""
        label = struct.pack(f">{len(self.path)}Q", *self.path)
        return Keystream(self.entropy.secret, label + b"/" + client)

    def _words(self, n: int) -> Tensor:
        """n uniform 64-bit words for each client, int64 `[K, n]` or `[n]`."""
        if self.clients is None:
            return torch.frombuffer(bytearray(self.bytes(8 * n) or b"\0"), dtype=torch.uint8)[: 8 * n].view(torch.int64)
        clients = self.clients.cpu()
        rows = [self.keystream(struct.pack(">q", k)).read(8 * n) for k in clients.tolist()]
        words = torch.frombuffer(bytearray(b"".join(rows) or b"\0"), dtype=torch.uint8)[: 8 * n * len(rows)]
        return words.view(torch.int64).view(len(rows), n).to(self.clients.device)

    def word(self) -> int:
        """One unsigned 64-bit word of the key without its clients."""
        return int.from_bytes(self.bytes(8), "little")

    def state(self) -> Tensor:
        """One uniform 64-bit word, int64: `[K]` with clients, `[]` without."""
        return self._words(1)[..., 0]

    def hash(self, n: int) -> Tensor:
        """Draw n uniform 64-bit words, int64 `[..., n]`."""
        return self._words(n)

    def bits(self, n: int) -> Tensor:
        """Draw n uniform 32-bit words, int64 `[..., n]` in [0, 2³²)."""
        words = self._words(-(-n // 2))
        return torch.stack((words & _U32, _shift(words, 32)), -1).flatten(-2)[..., :n]

    def normal(self, n: int | Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """Draw standard normal numbers of a length or a shape, `[..., *n]`."""
        shape = (n,) if isinstance(n, int) else tuple(n)
        drawn = super().normal(math.prod(shape), dtype)
        return drawn.reshape((*drawn.shape[:-1], *shape))

    def integers(self, n: int | Sequence[int], high: int) -> Tensor:
        """Draw integers uniform in [0, high), int64, of a length or a shape, `[..., *n]`, without bias.

        Raises:
            UsageError: high is not in 1 … 2⁶².
        """
        if not 1 <= high <= _MOST:
            raise UsageError(f"integers(high={high!r}).", "1 to 2^62.", "a draw has 62 bits.", "integers((3,), 10)")
        shape = (n,) if isinstance(n, int) else tuple(n)
        limit, key = _MOST // high * high, self  # words from `limit` on would favour small numbers
        out = self._words(math.prod(shape)) & (_MOST - 1)
        while bool((high_words := out >= limit).any()):
            key = key.fold("again")
            out = torch.where(high_words, key._words(out.shape[-1]) & (_MOST - 1), out)
        return (out % high).reshape((*out.shape[:-1], *shape))


@contextmanager
def global_scope(key: Key) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python from a key, and restore their states on exit.

    It serves code outside atoll that draws from global generators: initial weights, a user's own loop. Draws inside
    the block depend only on the key; draws after the block do not depend on it. Generators of CUDA devices are
    included if CUDA is initialized. The generators belong to the process: a second thread waits at the start of its
    block until the block of the first thread ends, or until the first thread waits inside `lend_generators`.

    Args:
        key: the source of the seed.
    Example:
        >>> def draw():
        ...     with global_scope(Key(7).fold("model")):
        ...         return torch.rand(2)
        >>> torch.equal(draw(), draw())
        True
    """
    seed = key.torch_seed()
    with _GENERATORS.own(), _restored():
        # torch.manual_seed would also seed devices that are not initialized yet, and that could not be restored.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        np.random.seed([seed & _U32, seed >> 32])
        random.seed(seed)
        yield


@contextmanager
def _restored() -> Iterator[None]:
    """Restore the states of the global generators on exit."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class _OneThread(threading.local):
    """Give the global generators and torch's default dtype of this process to one thread at a time.

    A thread that owns them may ask again. A process that is forked while another thread owns them starts with a new
    lock, because that thread does not exist in the new process.
    """

    depth = 0  # of this thread
    dtype = torch.float32  # the default dtype when this thread became the owner

    def __init__(self, lock: list[threading.Lock]) -> None:
        self._lock = lock  # a list, so that all threads of a forked process see its new lock

    @contextmanager
    def own(self) -> Iterator[None]:
        """Wait until no other thread owns them, and own them inside the block."""
        if self.depth:
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1
            return
        with self._lock[0]:
            self.depth, self.dtype = 1, torch.get_default_dtype()
            try:
                yield
            finally:
                self.depth = 0

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Let other threads own them inside the block, then own them again with the states of before."""
        if not self.depth:
            yield
            return
        depth, inner, outer = self.depth, torch.get_default_dtype(), self.dtype
        with _restored():
            torch.set_default_dtype(outer)
            self.depth = 0
            self._lock[0].release()
            try:
                yield
            finally:
                self._lock[0].acquire()
                self.depth = depth
                torch.set_default_dtype(inner)

    def forked(self) -> None:
        """Replace the lock in a forked process whose only thread does not own it."""
        if not self.depth:
            self._lock[0] = threading.Lock()


_GENERATORS = _OneThread([threading.Lock()])
os.register_at_fork(after_in_child=_GENERATORS.forked)


def lend_generators() -> AbstractContextManager[None]:
    """Let user code of other threads run inside the block: for a wait inside `user_scope`, as for clients of a server.

    On exit, the generators and the default dtype have the values of before. Outside of `user_scope` it does nothing.

    Example:
        >>> with user_scope(Key(7)):
        ...     with lend_generators():
        ...         _ = torch.rand(1)
        ...     inside = torch.rand(1)
        >>> with user_scope(Key(7)):
        ...     torch.equal(torch.rand(1), inside)
        True
    """
    return _GENERATORS.lend()


def generator_states() -> tuple[object, ...]:
    """The states of the global generators of torch on every device in use, of numpy and of Python.

    Two equal results mean that nothing was drawn in between.

    Example:
        >>> before = generator_states()
        >>> _ = torch.rand(1)
        >>> before == generator_states()
        False
    """
    kind, words, *rest = np.random.get_state(legacy=True)
    on_host = torch.random.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(words).tobytes()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return *on_host, kind, rest, [state.numpy().tobytes() for state in gpus]


def reseed(word: int) -> None:
    """Seed the global generators of torch on the host, of numpy and of Python. Call it only inside `global_scope`.

    It serves draws of single rows: it takes a fraction of the time of a scope.

    Args:
        word: the seed, an integer in [0, 2⁶⁴).
    """
    torch.default_generator.manual_seed(word >> 1)
    np.random.seed(word & _U32)
    random.seed(word)


def mixed(word: int, index: int) -> int:
    """A word of [0, 2⁶⁴) from a word and an index.

    Example:
        >>> mixed(1, 2) == mixed(1, 2), mixed(1, 2) == mixed(2, 1)
        (True, False)
    """
    return _mix((word + _GOLDEN & _U64) ^ _mix(index + _GOLDEN))


class GeneratorWatch:
    """Whether code has drawn from the global generators of the host since a moment; cheaper than two full states.

    Example:
        >>> draws = GeneratorWatch()
        >>> _ = torch.rand(1)
        >>> draws.found(), draws.restore(), draws.found()
        (True, None, False)
    """

    def __init__(self) -> None:
        self._numpy: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        self._before = self._state()

    def _state(self) -> tuple[bytes, bytes, object]:
        # The structure of the Mersenne Twister: 624 words and the position. Another generator gets a full state.
        where = self._numpy
        twister = isinstance(where, np.random.MT19937)
        numbers = ctypes.string_at(where.ctypes.state_address, 625 * 4) if twister else repr(where.state).encode()
        return torch.get_rng_state().numpy().tobytes(), numbers, random.getstate()

    def found(self) -> bool:
        """Whether the generators differ from those at the start."""
        return self._state() != self._before

    def restore(self) -> None:
        """Set the generators to their states at the start."""
        host, numbers, python = self._before
        torch.set_rng_state(torch.frombuffer(bytearray(host), dtype=torch.uint8))
        random.setstate(python)  # type: ignore[arg-type]
        if isinstance(self._numpy, np.random.MT19937):
            words = np.frombuffer(numbers, np.uint32)
            state: Any = {"key": words[:624].copy(), "pos": int(words[624])}
            self._numpy.state = {"bit_generator": "MT19937", "state": state}


@contextmanager
def user_modes() -> Iterator[None]:
    """Set torch's global modes to the defaults that atoll computes with, and restore the caller's modes on exit.

    Inside, gradients are recorded, inference mode and autocast are off, the default dtype is float32 and the default
    device is the CPU. A training therefore has the same bits under each mode of the caller. The default dtype and the
    generators belong to the process: a second thread waits until the block of the first one ends.

    Example:
        >>> with torch.no_grad(), user_modes():
        ...     torch.is_grad_enabled()
        True
    """
    with _GENERATORS.own():
        if _modes_are_default():
            yield
            return
        with _default_modes():
            yield


def _modes_are_default() -> bool:
    """Whether `_default_modes` would change nothing. An empty tensor shows three modes in one call."""
    made = torch.empty(0)
    modes = torch.is_grad_enabled() and not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))
    return modes and made.dtype == torch.float32 and made.is_cpu and not made.is_inference()


@contextmanager
def _default_modes() -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def user_scope(key: Key) -> Iterator[None]:
    """Call code of the user: with generators that are seeded from a key, and with torch's default modes.

    Modules, losses, metrics, data sets, factories, schedules, stop rules and training loops of the user are called
    inside. Their draws depend only on the key. The generators and modes of the caller are restored on exit:
    `global_scope` and `user_modes` list them. One thread of the process is inside at a time.

    Args:
        key: the source of the seed.
    Example:
        >>> with torch.no_grad(), user_scope(Key(7)):
        ...     first = torch.rand(2), torch.is_grad_enabled()
        >>> with user_scope(Key(7)):
        ...     torch.equal(torch.rand(2), first[0]), first[1]
        (True, True)
    """
    with user_modes(), global_scope(key):
        yield
