"""The device of a training: its name, its free memory, and errors that report that memory is full.

Tests: tests/faults/test_device_asked.py, tests/faults/test_memory.py, tests/identities/test_device.py.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from atoll.base.errors import UsageError
from atoll.base.lines import Change
from atoll.compute.batches import HOST
from atoll.data.clients import Clients

_GROUP = Path("/sys/fs/cgroup")  # of this process, in a container
_DATA_PART = 0.25  # largest part of a GPU's free memory that the data may occupy during the run
_TEXT = re.compile(r"auto|cpu|cuda(:\d+)?")
# Texts of torch's RuntimeError if an allocation fails.
_MEMORY_ERRORS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "not enough memory",
)


def resolve_device(text: str, rank: int | None = None) -> torch.device:
    """Resolve the name of a device.

    Args:
        text: `"auto"`, a GPU if there is one and else the CPU; `"cpu"`; `"cuda"` or `"cuda:1"`.
        rank: the local rank of this process under `torchrun`. If the name has no number, rank r takes GPU r modulo the
            number of GPUs. None: GPU 0.
    Returns:
        The device.
    Raises:
        UsageError: the name is unknown, or this machine does not have the device.
    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    why = ""
    if text.partition(":")[0] == "mps":
        why = "exact sums need float64, which mps does not have."
    if not _TEXT.fullmatch(text):
        raise UsageError(
            f"device = {text!r}.",
            "auto, cpu, cuda, or cuda:N with a number N.",
            why,
            Change("device", "auto"),
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not gpus):
        return HOST
    if not gpus:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        raise UsageError(
            f"device = {text!r}, and torch finds no GPU.",
            "a GPU, its driver, and a torch that was built for it.",
            "" if built else f"torch {torch.__version__} was built for CPUs.",
            Change("device", "cpu"),
        )
    index = int(text.partition(":")[2] or (rank or 0) % gpus)
    if index >= gpus:
        raise UsageError(
            f"device = {text!r}, and there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'}.",
            f"cuda:0{f' to cuda:{gpus - 1}' if gpus > 1 else ''}.",
            "GPUs are counted from 0.",
            Change("device", f"cuda:{gpus - 1}"),
        )
    return torch.device("cuda", index)


def local_rank() -> int:
    """The local rank of this process under `torchrun`; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_precision(precision: str, dtype: str, numerics: str, device: torch.device) -> None:
    """Refuse a precision that dtype, numerics or device do not support.

    Args:
        precision: "full" or "bf16".
        dtype: the dtype of the model, "float32" or "float64".
        numerics: the backend, or "auto".
        device: the device of the training.
    Raises:
        UsageError: the precision is not supported.
    """
    if precision == "full":
        return
    if dtype != "float32":
        raise UsageError(
            f"precision = {precision!r} with dtype = {dtype!r}.",
            "dtype = 'float32'.",
            "products in 16 bits do not need a model in 64 bits.",
            Change("dtype", "float32"),
        )
    if numerics in ("fused", "compiled"):
        raise UsageError(
            f"precision = {precision!r} with numerics = {numerics!r}.",
            "lanes or loop.",
            "these backends compute products and steps in the dtype of θ.",
            Change("numerics", "auto"),
        )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError(
            f"precision = {precision!r} on {torch.cuda.get_device_name(device)}.",
            "a GPU that computes in bfloat16.",
            "this GPU would convert every product to float32, which is slower.",
            Change("precision", "full"),
        )


def free(device: torch.device) -> int | None:
    """Free memory of a device in bytes, including memory that torch has reserved and does not use.

    Returns:
        Bytes; None on the host, where the size of the caches limits a chunk, not the size of the memory.
    """
    if device.type != "cuda":
        return None
    available, _ = torch.cuda.mem_get_info(device)
    return available + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def available(device: torch.device) -> int | None:
    """Memory of a device or of the host that a process can still get, in bytes; None: the system does not state it.

    The limit of a control group counts, such as that of a container.
    """
    if device.type != "cpu":
        return free(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        most, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return max(0, min(memory, most - used + int(cached["inactive_file"])))
    except (OSError, ValueError, KeyError):  # no control group, or one without a limit
        return memory


def move_rows(data: Clients, device: torch.device) -> Clients:
    """The clients, with their rows on the device if the rows take at most a quarter of its free memory."""
    return data.on(device, _DATA_PART * (free(device) or 0))


def gpu(device: torch.device) -> dict[str, str]:
    """The model of the GPU, for environment.json; {} for the host."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def empty_cache(device: torch.device) -> None:
    """Release memory that torch has reserved and does not use, so that a large allocation can succeed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that memory is full.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."))
        True
        >>> out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MEMORY_ERRORS)
