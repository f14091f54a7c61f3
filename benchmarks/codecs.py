"""Speed of codecs on one long update, in GB/s of float32 and as a fraction of the memory's read speed.

    python benchmarks/codecs.py [length] [--compiled] [--best]

Each number is the median of seven runs. With --best it is the best of forty, for a machine that is not idle.
`encode` runs on the client, `open` on the server for every message, `decode` on the server for every sum. A star
marks a number below its target on two cores (encode: Quantize 0.3, compiled 1.0, Eden 0.3, TopK 0.6 and three times
torch.topk; open and decode: 1.0).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.plan.codec import grid
from atoll.plan.codec.eden import Eden
from atoll.plan.codec.quantize import Cast, Quantize, Sign
from atoll.plan.codec.rotate import Rotate
from atoll.plan.codec.sparse import RandomK, TopK
from atoll.plan.codec.stage import Codec, flat_layout

CODECS = [
    (Cast("bf16"), 0.0),
    (Quantize(8), 0.3),
    (Quantize(4), 0.3),
    (Quantize(levels=1), 0.3),
    (Sign(), 0.0),
    (Rotate(), 0.0),
    (Eden(1), 0.3),
    (Eden(2), 0.3),
    (Eden(4), 0.3),
    (Eden(8), 0.3),
    (TopK(0.01), 0.6),
    (TopK(0.001), 0.6),
    (RandomK(0.1), 0.0),
    (TopK(0.01) >> Quantize(8), 0.0),
]


class Watch:
    """Measure speeds in GB/s, after one warm-up run."""

    def __init__(self, best: bool) -> None:
        self.repeats, self.of = (40, min) if best else (7, statistics.median)

    def __call__(self, run: Callable[[], object], nbytes: int) -> float:
        run()
        seconds = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return nbytes / self.of(seconds) / 1e9


def cell(value: float, read: float, target: float) -> str:
    if value > read:
        return f"{'–':>14}"  # the codec has no such half
    return f"{value:7.2f}{'*' if value < target else ' '} {value / read:4.0%} "


def row(codec: Codec, target: float, x: Tensor, read: float, speed: Watch) -> str:
    layout, key, nbytes = flat_layout(x.shape[1]), Key(1).of(torch.arange(1)), 4 * x.numel()
    codec = codec.bind(layout)
    payload, side, *_ = codec.encode(x, {}, {}, key)
    opened = codec.decode(payload, side)
    encode = speed(lambda: codec.encode(x, {}, {}, key), nbytes)
    open_ = speed(lambda: codec.decode(payload, side), nbytes) if codec.per_message else read * 2
    decode = speed(lambda: codec.decode_sum(opened, key), nbytes) if codec.per_sum else read * 2
    bits = 8 * codec.nbytes(layout) / layout.d
    cells = (cell(encode, read, target), cell(open_, read, 1.0), cell(decode, read, 1.0))
    return f"{codec!r:28} {bits:8.3f} {''.join(cells)}"


def compiled(x: Tensor, read: float, speed: Watch) -> str:
    """Measure `Quantize(8)` fused by torch.compile, on all whole groups together; its bits equal the eager ones."""
    codec = Quantize(8)
    rows = x[0, : x.shape[1] // grid.GROUP * grid.GROUP].view(1, -1, grid.GROUP)
    state = grid.words(torch.tensor([7]), rows.shape[1])
    fused = torch.compile(codec.quantise, dynamic=False)
    with warnings.catch_warnings():  # torch.compile warns about a cache
        warnings.simplefilter("ignore")
        same = all(map(torch.equal, fused(rows, state), codec.quantise(rows, state)))
    if not same:
        raise SystemExit("Quantize(8) has other bits when it is compiled.")
    return f"{'Quantize(8), compiled':28} {'':8} {cell(speed(lambda: fused(rows, state), 4 * rows.numel()), read, 1.0)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("length", nargs="?", type=int, default=10_000_000)
    parser.add_argument("--compiled", action="store_true", help="also Quantize fused by torch.compile (a minute)")
    parser.add_argument("--best", action="store_true", help="the best of forty runs, not the median of seven")
    given = parser.parse_args()
    speed = Watch(given.best)
    x = torch.randn(1, given.length, generator=torch.Generator().manual_seed(0))
    large = torch.ones(max(given.length, 50_000_000))
    read = speed(large.sum, 4 * large.numel())
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"read {read:.1f} GB/s; d = {given.length:,}\n")
    print(f"{'codec':28} {'bits':>8} {'encode':>9}      {'open':>9}      {'decode':>9}")
    for codec, target in CODECS:
        print(row(codec, target, x, read, speed), flush=True)
    if given.compiled:
        print(compiled(x, read, speed))
    plain = speed(lambda: torch.topk(x.abs(), max(1, given.length // 100)), 4 * x.numel())
    top = TopK(0.01).bind(flat_layout(given.length))
    ours = speed(lambda: top.encode(x, {}, {}, Key(1)), 4 * x.numel())
    print(f"\ntorch.topk {plain:.2f} GB/s; TopK(0.01) is {ours / plain:.1f} times as fast{' *' * (ours < 3 * plain)}")


if __name__ == "__main__":
    main()
