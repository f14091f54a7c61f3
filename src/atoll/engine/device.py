"""The device that a training computes on: found by its name, how much memory it has left, and what says it has none."""

from __future__ import annotations

import os
import re

import torch

from atoll.data.clients import Clients
from atoll.errors import UsageError
from atoll.plan.lanes import HOST

PRECISIONS = ("full", "bf16")
_DATA_PART = 0.25  # of a GPU's free memory that the data may take for good
_TEXT = re.compile(r"auto|cpu|cuda(:\d+)?")
# What torch says in a plain RuntimeError where the system gives no memory.
_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "not enough memory")


def found(text: str, rank: int | None = None) -> torch.device:
    """The device of a name.

    Args:
        text: `"auto"`, a GPU where there is one and else the CPU; `"cpu"`; `"cuda"` or `"cuda:1"`.
        rank: of `torchrun` on this machine, each of which takes the GPU of its number where none is named; None: the
            first one.
    Raises:
        UsageError: no such device, or not here.
    Example:
        >>> found("cpu")
        device(type='cpu')
    """
    why = ""
    if text.partition(":")[0] == "mps":
        why = "exact sums are held in float64, which mps does not have."
    if not _TEXT.fullmatch(text):
        raise UsageError(f"device = {text!r}.", "auto, cpu, cuda, or cuda: and a number.", why, "--device auto")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not gpus):
        return HOST
    if not gpus:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        raise UsageError(
            f"device = {text!r}, and torch finds no GPU.",
            "a GPU, its driver, and a torch that was built for it.",
            "" if built else f"this is torch {torch.__version__}, built for CPUs.",
            "--device cpu",
        )
    index = int(text.partition(":")[2] or (rank or 0) % gpus)
    if index >= gpus:
        raise UsageError(
            f"device = {text!r}, and there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'}.",
            f"cuda:0{f' to cuda:{gpus - 1}' if gpus > 1 else ''}.",
            "they are counted from 0.",
            f"--device cuda:{gpus - 1}",
        )
    return torch.device("cuda", index)


def local_rank() -> int:
    """The number of this process among those that `torchrun` started on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_precision(precision: str, dtype: str, numerics: str, device: torch.device) -> None:
    """Refuse a precision that is none, or that cannot be had.

    Raises:
        UsageError: which, and what to write instead.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision = {precision!r}.", f"one of {', '.join(PRECISIONS)}.", write="--precision full")
    if precision == "full":
        return
    if dtype != "float32":
        raise UsageError(
            f"precision = {precision!r} with dtype = {dtype!r}.",
            "dtype = 'float32'.",
            "what is computed in 16 bits does not need a model of 64.",
            "--dtype float32",
        )
    if numerics in ("fused", "compiled"):
        raise UsageError(
            f"precision = {precision!r} with numerics = {numerics!r}.",
            "lanes or loop.",
            "layers by hand make a step out of their products, in the type of θ.",
            "--numerics auto",
        )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError(
            f"precision = {precision!r} on {torch.cuda.get_device_name(device)}.",
            "a GPU that computes in bfloat16.",
            "without it every product would go through float32, and take longer.",
            "--precision full",
        )


def free(device: torch.device) -> int | None:
    """Bytes that are free on a device of its own memory, those included that torch holds and does not use.

    Returns:
        None on the host, where what counts is not how much there is but how much stays near the cores.
    """
    if device.type != "cuda":
        return None
    there, _ = torch.cuda.mem_get_info(device)
    return there + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def nearby(data: Clients, device: torch.device) -> Clients:
    """The clients, their rows on a device for good where they leave most of its memory free."""
    return data.on(device, _DATA_PART * (free(device) or 0))


def gpu(device: torch.device) -> dict[str, str]:
    """The kind of GPU, to be written down; nothing for the host."""
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def give_back(device: torch.device) -> None:
    """Give back what torch holds of a device's memory and does not use: in one piece it may be enough."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory for something.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."))
        True
        >>> out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)
