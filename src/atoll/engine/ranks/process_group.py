"""The process group of `torchrun`, and its collectives. They transport tensors and bytes, never objects.

`torch.distributed` is imported when a process joins a group, not earlier. A collective waits for every rank, so all
ranks call the same collectives in the same order. A rank with an error sends it to the others, and then all ranks raise
the same error.

Tests: tests/parity/test_torchrun.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change, EngineChange
from atoll.compute import limits
from atoll.engine.ranks.launch import check_launch, command, joined, other_size

_GATHERED = 1 << 12  # bytes that every rank sends first, while the length of the longest message is unknown


@dataclass(frozen=True)
class ProcessGroup:
    """A group of processes that compute one training.

    Args:
        rank: the number of this process, in [0, size).
        size: the number of processes, ≥ 1.
        device: the device on which the collectives expect tensors.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(
        cls, workers: int | None = None, backend: str = "auto", device: torch.device | None = None
    ) -> ProcessGroup:
        """Join the ranks that `torchrun` started, or use the group that the program has joined already.

        Args:
            workers: the required number of ranks; None accepts any number.
            backend: `"gloo"`, `"nccl"` or `"auto"`. With `"auto"`, a group that the program has joined keeps its
                backend. Otherwise the backend is nccl if every rank computes on a GPU of its own, else gloo.
            device: the device on which this rank computes.
        Returns:
            The group.
        Raises:
            UsageError: `torchrun` did not start this process, the number of ranks differs from `workers`, or `nccl`
                does not have a GPU for each rank.
        """
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        check_ranks(workers, backend)
        if not joined():
            with together():
                store, rank, size = next(rendezvous("env://"))
                store = PrefixStore(_meeting(store, rank, size), store)
                name = _usual(device) if backend == "auto" else backend
                distributed.init_process_group(name, store=store, rank=rank, world_size=size)
            _leave_at_exit()
        size = distributed.get_world_size()
        if workers is not None and size != workers:
            raise other_size(workers, size)
        cuda = distributed.get_backend() == "nccl"
        own = device if device is not None and device.type == "cuda" else torch.device("cuda", _local("RANK", 0))
        return cls(distributed.get_rank(), size, own if cuda else torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the run and prints."""
        return self.rank == 0

    def broadcast(self, data: bytes) -> bytes:
        """Broadcast the bytes of rank 0 and return them. The argument of other ranks is ignored."""
        from torch import distributed

        length = torch.tensor([len(data)], device=self.device)
        with together():
            distributed.broadcast(length, 0)
            sent = _bytes(data, int(length)).to(self.device)
            distributed.broadcast(sent, 0)
        return sent.cpu().numpy().tobytes()

    def all_gather_bytes(self, data: bytes, most: int = _GATHERED) -> list[bytes]:
        """Gather the bytes of every rank, in order of ranks. One collective suffices if none is longer than `most`."""
        length = torch.tensor([len(data)]).view(torch.uint8)
        heads = self._gather(torch.cat((length, _bytes(data[:most], most))))
        lengths = [int(h[:8].view(torch.int64)) for h in heads]
        if max(lengths) > most:
            heads = self._gather(torch.cat((length, _bytes(data, max(lengths)))))
        return [h[8 : 8 + n].numpy().tobytes() for h, n in zip(heads, lengths, strict=True)]

    def _gather(self, mine: Tensor) -> list[Tensor]:
        from torch import distributed

        out = [torch.empty_like(mine, device=self.device) for _ in range(self.size)]
        with together():
            distributed.all_gather(out, mine.to(self.device))
        return [t.cpu() for t in out]

    def rows(self, mine: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Gather one tensor of each rank, bit for bit.

        Args:
            mine: the tensor of this rank.
            shapes: the shape of each rank's tensor.
        Returns:
            The tensors in order of ranks.
        """
        from torch import distributed

        out = []
        with together():
            for rank, shape in enumerate(shapes):
                whole = mine if rank == self.rank else mine.new_empty(tuple(shape))
                flat = whole.contiguous().view(-1).view(torch.uint8).to(self.device)
                if flat.numel():
                    distributed.broadcast(flat, rank)
                out.append(flat.cpu().view(mine.dtype).view(tuple(shape)))
        return out

    def all_gather(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of every rank, in the order of ranks, on the host. Names and shapes may differ."""
        return [
            load(data) for data in self.all_gather_bytes(save({n: t.cpu().contiguous() for n, t in tensors.items()}))
        ]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over all ranks of each tensor, in place if possible; the same bits at every rank."""
        return self._reduce(tensors, "SUM")

    def all_reduce_max(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The elementwise maximum of each tensor over all ranks. It may overwrite its arguments."""
        return self._reduce(tensors, "MAX")

    def _reduce(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Reduce long tensors in one asynchronous collective each, and all short tensors of one dtype in one."""
        from torch import distributed

        how = getattr(distributed.ReduceOp, name)
        out: list[Tensor] = [t.to(self.device).contiguous() for t in tensors]
        with together():
            works = [distributed.all_reduce(t, how, async_op=True) for t in out if t.numel() >= limits.JOINT_REDUCTION]
            for dtype in sorted({t.dtype for t in out}, key=str):
                few = [i for i, t in enumerate(out) if t.numel() < limits.JOINT_REDUCTION and t.dtype == dtype]
                joint = torch.cat([out[i].reshape(-1) for i in few]) if few else torch.empty(0)
                if joint.numel():
                    distributed.all_reduce(joint, how)
                for i, piece in zip(few, joint.split([out[i].numel() for i in few]) if few else (), strict=True):
                    out[i] = piece.view(out[i].shape)
            for work in works:
                work.wait()
        return [t.to(like.device) for t, like in zip(out, tensors, strict=True)]


def _meeting(store: Any, rank: int, size: int) -> str:
    """A rendezvous token that all ranks of this start agree on, and that no earlier start has used.

    `torchrun` may keep its store after a restart, with the entries of the previous start. A rank that reads them then
    looks for dead ranks (pytorch issue 135712). So rank 0 publishes a random token and waits until every rank has read
    it. Then it deletes the token, and only after that confirms it. A token of an earlier start that can still be read
    was therefore never confirmed.
    """
    if rank == 0:
        word = secrets.token_hex(8)
        store.set("atoll/word", word)
        store.wait([f"atoll/{word}/{other}" for other in range(1, size)])
        store.delete_key("atoll/word")
        store.set(f"atoll/{word}/all", "")
        return word
    while True:
        word = store.get("atoll/word").decode()
        store.set(f"atoll/{word}/{rank}", "")
        with contextlib.suppress(RuntimeError):  # not confirmed within 1 s: the token is of an earlier start
            store.wait([f"atoll/{word}/all"], timedelta(seconds=1))
            return str(word)


def _bytes(data: bytes, length: int) -> Tensor:
    """Bytes as a uint8 tensor of this length, padded with zeros."""
    return torch.frombuffer(bytearray(data.ljust(max(length, 1), b"\0")[: max(length, 1)]), dtype=torch.uint8)[:length]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turn the error of a collective after the loss of a rank into a RunError with a command."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"Another rank has ended: {str(error).strip().splitlines()[0][:200]}",
            "all ranks in every round.",
            "the sum would lack the clients of that rank. The last checkpoint is intact.",
            command_with_restarts(),
        ) from error


def command_with_restarts() -> str:
    """The command that starts this program with automatic restarts after a rank has died."""
    return command(int(os.environ.get("LOCAL_WORLD_SIZE", "2"))).replace("torchrun", "torchrun --max-restarts 3", 1)


def _local(what: str, unsaid: int) -> int:
    """A variable `LOCAL_…` of `torchrun` as a number, or `unsaid` if it is not set."""
    return int(os.environ.get(f"LOCAL_{what}", unsaid))


def _usual(device: torch.device | None) -> str:
    """The default backend of torch.distributed: nccl if every rank of this machine has its own GPU, else gloo."""
    own = device is not None and device.type == "cuda" and torch.cuda.device_count() >= _local("WORLD_SIZE", 1)
    if own:
        torch.cuda.set_device(device)
    return "nccl" if own else "gloo"


def _leave_at_exit() -> None:
    import atexit

    from torch import distributed

    def leave() -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()

    atexit.register(leave)


def check_ranks(workers: int | None, backend: str) -> None:
    """Refuse a process that cannot join other ranks: each rank would wait for the others forever.

    Args:
        workers: required number of ranks; None accepts any number.
        backend: "gloo", "nccl" or "auto".
    Raises:
        UsageError: `torchrun` did not start this process, it started another number of ranks, or `nccl` has too few
            GPUs.
    """
    from torch import distributed

    if joined():
        return
    if not distributed.is_available():
        raise UsageError(
            "This torch was built without torch.distributed.", "a build with it.", write=Change("engine", "inprocess")
        )
    check_launch(workers)
    if backend == "nccl":
        here, gpus = _local("WORLD_SIZE", 1), torch.cuda.device_count()
        if gpus < here:
            raise UsageError(
                f"backend = 'nccl' for {here} ranks on a machine with {gpus} GPUs.",
                "a GPU for each rank.",
                "nccl sends from GPU to GPU.",
                EngineChange("Torchrun(backend='gloo')", "backend", "gloo"),
            )
        torch.cuda.set_device(_local("RANK", 0))
