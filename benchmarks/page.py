"""The cost of the page: start, idle, training, a large run in Chromium, the stream, a report, Hugging Face.

    python benchmarks/page.py                        all tables, about five minutes
    python benchmarks/page.py --only start,idle      some of them

start: CPU of `atoll ui` up to its first line, and of `runs`, `show` and `compare` in a folder of 200 runs. idle: CPU of
a server of 200 runs, first without a page, then with the list in Chromium. cost: CPU of one training with and without
the page of its run in Chromium, by turns. size: a run of 10,000 rounds and 1,000 clients in Chromium: seconds until the
table of clients and all curves are there, frames a second while a zoomed curve is panned, the memory of the server, its
largest answer, and its report. stream: how long after its row each of 300 rounds arrives over two cut streams. report:
the report of the demo. hf: a round of a BERT from a config, and the same steps in a bare loop, by turns. CPU times are
those of processes. `size`, and parts of `idle` and `cost`, need playwright and Chromium; `hf` needs transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ATOLL = (sys.executable, "-m", "atoll")
TRAIN = """
import sys, time, atoll
data = atoll.data.load("digits").split(clients=20)
out, rounds = sys.argv[1], int(sys.argv[2])
atoll.train("mlp", data, "fedavg(lr=0.1, batch=10)", rounds=rounds, out=out, report=False, progress="none")
print(time.process_time())
"""


def main(words: Sequence[str] | None = None) -> int:
    parts = {p.__name__: p for p in (start, idle, cost, size, stream, report, hf)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help="names of tables")
    for name in parser.parse_args(words).only.split(","):
        with tempfile.TemporaryDirectory(prefix="atoll-page-") as folder:
            parts[name](Path(folder))
    return 0


def line(name: str, value: str, limit: str) -> None:
    print(f"{name:<52} {value:>22}   limit {limit}", flush=True)


# Processes


def used(pid: int) -> float:
    """The CPU seconds of a running process, all threads, with a resolution of nanoseconds."""
    return sum(int(f.read_text().split()[0]) for f in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def cpu_of(command: Sequence[str], **options: Any) -> float:
    """The CPU seconds of a process that ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Page:
    """A served folder: the process, its address, and requests with its cookie."""

    def __init__(self, out: Path, *words: str) -> None:
        command = (*ATOLL, "ui", *words, "--out", str(out), "--json", "--no-open")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = str(json.loads(self.process.stdout.readline())["url"])
        self.first = used(self.process.pid)
        self.base = self.url.partition("/?")[0]
        self.token = self.url.partition("token=")[2].partition("#")[0]

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)

    def cpu(self) -> float:
        return used(self.process.pid)

    def memory(self) -> float:
        """The largest resident memory so far, in MB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6

    def open(self, path: str, **headers: str) -> Any:
        mark = "&" if "?" in path else "?"
        request = urllib.request.Request(f"{self.base}{path}{mark}token={self.token}", headers=headers)
        return urllib.request.urlopen(request, timeout=60)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as found:
        browser = found.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


# Runs


def written(folder: Path, rounds: int, clients: int, names: bool = False, seed: int = 0) -> Path:
    """A run folder as a training of these rounds and clients leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'data = "digits"\nmodel = "mlp"\nrecipe = "fedavg(lr=0.1)"\nrounds = {rounds}\nseed = {seed}\n'
    )
    (folder / "environment.json").write_text(
        json.dumps({"plan": "Plan(Train(sgd(0.1)), aggregator=Mean())", "held_out": "a"})
    )
    ids = list(range(clients))
    first = {"event": "start", "selection": "accuracy", "rising": True, "time": "2026-01-02T03:04:05+00:00"}
    first |= {"names": [f"hospital {i}" for i in ids]} if names else {"clients": clients}
    with open(folder / "metrics.jsonl", "w") as rows, open(folder / "events.jsonl", "w") as events:
        events.write(json.dumps(first) + "\n")
        for t in range(rounds):
            loss = 2.3 / (1 + t / 50) + 0.01 * (t % 7)
            values = {
                "loss": loss,
                "held_out_loss": loss + 0.02,
                "accuracy": 1 - loss / 3,
                "balanced_accuracy": 1 - loss / 2.9,
            }
            counts = {
                "cohort": clients,
                "arrived": clients,
                "failed": 0,
                "bytes_up": 9640 * clients,
                "bytes_down": 9640 * clients,
            }
            row = {"round": t, "fingerprint": f"{t:012x}", **values, "gradient_norm": loss / 2, "lr": 0.1, **counts}
            rows.write(json.dumps({**row, "seconds": 0.01 + 1e-6 * (t % 900)}) + "\n")
            if clients:
                each = [round(loss + (i * 7919 + t) % 997 / 997, 6) for i in ids]
                events.write(
                    json.dumps({"event": "clients", "round": t, "id": ids, "loss": each, "rows": [60] * clients}) + "\n"
                )
        stop = {"event": "stop", "status": "done", "reason": "all rounds were run", "wall": 100.0}
        events.write(json.dumps({**stop, "time": "2026-01-02T04:04:05+00:00"}) + "\n")
    return folder


def many(out: Path, count: int = 200) -> Path:
    for n in range(count):
        written(out / f"2026-01-{1 + n // 20:02d}-run-{n:03d}", 60, 10, seed=n)
    return out


# Tables


def start(folder: Path, times: int = 7) -> None:
    out = many(folder / "runs")
    names = sorted(p.name for p in out.iterdir())
    commands: dict[str, tuple[str, ...]] = {
        "runs": ("runs",),
        "show": ("show", names[3]),
        "compare, two runs": ("compare", names[3], names[4]),
        "compare, 200 runs": ("compare", "2026-*", "--group", "recipe"),
    }
    found: dict[str, list[float]] = {name: [] for name in ("ui", *commands)}
    for _ in range(times):
        with Page(out) as page:
            found["ui"].append(page.first)
        for name, words in commands.items():
            found[name].append(cpu_of((*ATOLL, *words, "--out", str(out))))
    for name, values in found.items():
        value = f"{statistics.median(values):.3f} s ({min(values):.3f})"
        line(f"start: CPU of {name}, median (least)", value, ".6 s" if name == "ui" else ".4 s")


def idle(folder: Path, seconds: float = 20) -> None:
    with Page(many(folder / "runs")) as page:
        page.open("/api/runs").read()
        began, first = time.monotonic(), page.cpu()
        threading.Event().wait(seconds)
        line(
            "idle: server of 200 runs, no page",
            f"{(page.cpu() - first) / (time.monotonic() - began):.2%} of a core",
            "1 %",
        )
        with contextlib.suppress(ImportError), chromium() as browser:
            tab = browser.new_page()
            tab.goto(page.url)
            tab.locator("tbody tr").first.wait_for()
            began, first = time.monotonic(), page.cpu()
            tab.wait_for_timeout(1000 * seconds)
            share = (page.cpu() - first) / (time.monotonic() - began)
            line("idle: the same with the list open in a browser", f"{share:.2%} of a core", "none")


def cost(folder: Path, times: int = 5, rounds: int = 600) -> None:
    """The training has CPU times of its own; the page costs it only what two programs on one machine share."""
    found: dict[str, list[float]] = {"alone": [], "page": []}

    def train(out: Path) -> float:
        done = subprocess.run(
            (sys.executable, "-c", TRAIN, str(out), str(rounds)), check=True, capture_output=True, text=True
        )
        return float(done.stdout)

    out = folder / "runs"
    train(out)
    with chromium() as browser:
        for _ in range(times):
            found["alone"].append(train(out))
            with Page(out) as page:
                tab = browser.new_page()
                tab.goto(page.url)
                before = set(out.iterdir())
                made: list[float] = []
                training = threading.Thread(target=lambda: made.append(train(out)))  # noqa: B023
                training.start()
                while not (new := [p for p in set(out.iterdir()) - before if (p / "metrics.jsonl").is_file()]):
                    tab.wait_for_timeout(20)
                tab.goto(f"{page.url}#{new[0].name}")
                while training.is_alive():
                    tab.wait_for_timeout(50)
                shown = tab.evaluate("atoll.view() ? atoll.view().next : 0")
                assert shown > 1, "the page did not show the run"
                found["page"] += made
                tab.close()
    alone, page_open = (statistics.median(found[n]) for n in ("alone", "page"))
    value = f"{page_open / alone - 1:+.1%} ({alone:.2f} s)"
    line(f"cost: CPU of a training with its page open, medians of {times}", value, "+2 %")


FRAMES = """async () => {
  const curve = [...atoll.view().curves.values()][0], x = curve.plot.data[0];
  curve.range(x[0], (x[x.length - 1] - x[0]) / 5);
  const step = (x[x.length - 1] - x[0]) / 300;
  let at = x[0], frames = 0;
  const began = performance.now();
  while (performance.now() - began < 3000) {
    await new Promise(requestAnimationFrame);
    at += step;
    curve.range(at, (x[x.length - 1] - x[0]) / 5);
    frames += 1;
  }
  return 1000 * frames / (performance.now() - began);
}"""


def size(folder: Path, times: int = 5) -> None:
    run = written(folder / "runs" / "2026-01-02-big", 10_000, 1000, names=True)
    sizes, seconds, frames = {}, [], 0.0
    with chromium() as browser:
        for _ in range(times):
            with Page(folder / "runs") as page:  # a new server has no answer from before
                tab = browser.new_page(viewport={"width": 1440, "height": 900})
                tab.goto("about:blank")
                began = time.monotonic()
                tab.goto(f"{page.url}#{run.name}")
                tab.locator(".curve canvas").first.wait_for()
                tab.locator("tbody tr >> text=hospital").first.wait_for()
                tab.evaluate("() => new Promise(requestAnimationFrame)")
                seconds.append(time.monotonic() - began)
                frames = max(frames, tab.evaluate(FRAMES))
                tab.close()
                for path in (
                    "/",
                    "/api/runs",
                    *(f"/api/runs/{run.name}{p}" for p in ("", "/rows?after=-1", "/clients")),
                ):
                    sizes[path] = len(page.open(path).read()) / 1e6
                memory = page.memory()
    line(
        "size: 10,000 rounds x 1,000 clients, open, median",
        f"{statistics.median(seconds):.2f} s ({min(seconds):.2f})",
        "2 s",
    )
    line("size: frames a second while panning", f"{frames:.0f}", "at least 30")
    line("size: largest memory of the server", f"{memory:.0f} MB", "150 MB")
    line("size: largest answer", f"{max(sizes.values()):.2f} MB", "5 MB")
    began = time.process_time()
    from atoll.report.draw import draw

    draw(run)
    value = f"{(run / 'report.html').stat().st_size / 1e6:.2f} MB, {time.process_time() - began:.1f} s"
    line("size: its report, and the CPU to draw it", value, "2 MB")


def stream(folder: Path, rounds: int = 300) -> None:
    out, seen, got = folder / "runs", dict[int, float](), dict[int, list[float]]()
    training = subprocess.Popen((sys.executable, "-c", TRAIN, str(out), str(rounds)), stdout=subprocess.DEVNULL)
    while not (logs := list(out.glob("2*/metrics.jsonl"))):
        threading.Event().wait(0.005)
    done = threading.Event()

    def watch() -> None:
        count = at = 0
        while not done.wait(0.002):
            with open(logs[0], "rb") as log:
                log.seek(at)
                new = log.read()
            at += len(new)
            for _ in range(new.count(b"\n")):
                seen[count] = time.monotonic()
                count += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    with Page(out) as page:
        last = -1
        for limit in (rounds // 3, 2 * rounds // 3, rounds):  # two streams are cut, the third reads to the end
            with page.open(f"/api/runs/{logs[0].parent.name}/live", **{"Last-Event-ID": str(last)}) as answer:
                kind = ""
                for raw in answer:
                    text = raw.decode().rstrip("\n")
                    kind = text[7:] if text.startswith("event: ") else kind
                    if text.startswith("data: ") and kind == "round":
                        last = json.loads(text[6:])["round"]
                        got.setdefault(last, []).append(time.monotonic())
                    if kind == "end" or (limit < rounds and last + 1 >= limit):
                        break
    training.wait(60)
    done.set()
    watcher.join()
    once = sorted(got) == list(range(rounds)) and all(len(v) == 1 for v in got.values())
    late = sorted(got[t][0] - seen[t] for t in got)
    line(f"stream: {rounds} rounds over two cuts, each once", str(once), "True")
    line(
        "stream: p95 and largest delay behind the row", f"{late[int(0.95 * len(late))]:.3f} s, {late[-1]:.3f} s", "1 s"
    )


def report(folder: Path) -> None:
    from atoll.report.draw import draw

    words = ("run", "--baselines", "--quiet", "--out", str(folder / "runs"))
    subprocess.run((*ATOLL, *words), check=True, capture_output=True)
    (run,) = (p.parent for p in (folder / "runs").glob("2*/config.toml"))
    shown = (run / "report.html").stat().st_size
    draw(run)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        draw(run)
        seconds.append(time.process_time() - began)
    line("report: of the demo", f"{shown / 1000:.0f} kB", "250 kB")
    line("report: CPU to draw it, median of 5", f"{statistics.median(seconds):.3f} s", ".2 s")


def hf(folder: Path, rounds: int = 12) -> None:
    """A BERT with two layers of width 64: rounds of 4 clients with 80 rows in batches of 16, and the same steps."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    import copy

    import numpy as np
    import torch
    import transformers

    import atoll

    torch.set_num_threads(1)
    torch.manual_seed(0)
    body = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=200, max_position_embeddings=64, num_labels=2, **body)
    )
    ids = np.random.default_rng(0).integers(1, 200, (320, 32))
    columns = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    y = (ids[:, 0] > 99).astype(int)
    data = atoll.data.arrays(columns, y).split(clients=4, by=atoll.data.IID(), held_out=0)
    bare, inputs, target = copy.deepcopy(model), {n: torch.tensor(c) for n, c in columns.items()}, torch.tensor(y)

    def loop() -> None:
        for c in range(4):
            mine = copy.deepcopy(bare).train()
            optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
            for b in range(80 * c, 80 * c + 80, 16):
                optimizer.zero_grad()
                logits = mine(**{n: x[b : b + 16] for n, x in inputs.items()}).logits
                torch.nn.functional.cross_entropy(logits, target[b : b + 16]).backward()
                optimizer.step()

    training = iter(atoll.rounds(model, data, "fedavg(lr=0.1, batch=16)", rounds=rounds + 2))
    times: dict[str, list[float]] = {"atoll": [], "bare": []}
    for turn in range(rounds + 1):
        for name, work in (("atoll", lambda: next(training)), ("bare", loop)):
            began = time.process_time()
            work()
            times[name] += [time.process_time() - began] if turn else []
    ours, theirs = (statistics.median(times[n]) for n in ("atoll", "bare"))
    line("hf: round of a BERT, against a bare loop", f"{ours / theirs:.2f} ({1000 * ours:.0f} ms)", "1.1")


if __name__ == "__main__":
    raise SystemExit(main())
