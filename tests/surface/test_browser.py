"""The page in Chromium: each round in time and once, hostile text, access, widths. `make faces` runs these tests."""

import contextlib
import json
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tarfile
import threading
import time

import pytest
from hostile import HOSTILE
from network import TICK

import atoll
from atoll.base.errors import RunError
from atoll.report.draw import draw
from atoll.runs.folder import RunFolder
from atoll.runs.labels import Labels

browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup-faces")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AXE = "axe-core@4.14.1"  # a check of accessibility, MPL-2.0; it is not part of atoll
TRAIN = """
import sys, threading, atoll
data = atoll.data.load("digits").split(clients=5)
pause = threading.Event()
atoll.train("softmax", data, "fedavg(lr=0.1)", rounds=60, out=sys.argv[1], resume=(sys.argv[2:] or [None])[0],
            checkpoint_s=0.5, report=False, progress="none", observers=[lambda report: pause.wait(0.1)])
"""
ROUNDS = """([...document.querySelectorAll(".tiles div")].filter((d) => d.querySelector("dt").textContent === "rounds")
  .map((d) => parseInt(d.querySelector("dd").textContent))[0] || 0)"""
SMALL = """[...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) &&
    !["SCRIPT", "STYLE", "OPTION", "NOSCRIPT"].includes(e.tagName))
  .map((e) => [parseFloat(getComputedStyle(e).fontSize) *
    (e.getScreenCTM ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1), e.textContent])
  .filter(([size]) => size < 10.99)"""


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or pytest.skip("no Chromium is installed")
    with browsers.sync_playwright() as found:
        browser = found.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    npm = shutil.which("npm") or pytest.skip("no npm is installed")
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run([npm, "pack", AXE, "--silent"], cwd=folder, capture_output=True, text=True, timeout=100)
    if done.returncode:
        pytest.skip(f"npm has no {AXE}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with a run that has baselines and a report, and with a failed run."""
    out = tmp_path_factory.mktemp("demo")
    data = atoll.data.load("digits").split(clients=12, by=atoll.data.Dirichlet(0.3))
    atoll.train("mlp", data, "fedavg(lr=0.3, batch=10)", rounds=8, baselines=True, out=out, progress="none")
    with pytest.raises(RunError):
        atoll.train("mlp", data, "fedavg(lr=3e4, batch=10)", rounds=8, out=out, progress="none")
    return out


@contextlib.contextmanager
def served(out):
    """`atoll ui` as a process; gives its address and its port."""
    command = [sys.executable, "-m", "atoll", "ui", "--out", str(out), "--json", "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = json.loads(server.stdout.readline())["url"]
            yield url, int(url.partition("127.0.0.1:")[2].partition("/")[0])
        finally:
            server.terminate()


class Relay(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of this machine; `cut` ends those that are open."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port):
        self.to, self.sockets = port, set()
        super().__init__(("127.0.0.1", 0), Pipe)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.cut()
        self.shutdown()
        self.server_close()

    def cut(self):
        for each in list(self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Pipe(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(("127.0.0.1", self.server.to)) as other:
            ends = {self.request, other}
            self.server.sockets |= ends
            back = threading.Thread(target=pass_on, args=(other, self.request), daemon=True)
            back.start()
            pass_on(self.request, other)
            back.join()
            self.server.sockets -= ends


def pass_on(one, other):
    with contextlib.suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    for each in (one, other):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def until(page, expression, seconds=60):
    """Evaluate an expression until it is true; returns it. The policy of the page forbids `wait_for_function`."""
    end = time.monotonic() + seconds
    while not (found := page.evaluate(expression)):
        assert time.monotonic() < end, f"{expression} stayed {found}: {page.evaluate('document.body.innerText')[:500]}"
        page.wait_for_timeout(10)
    return found


def row(t):
    return json.dumps({"round": t, "loss": 1 / (t + 1), "accuracy": t / 20, "arrived": 2, "cohort": 2}) + "\n"


def test_each_of_twenty_rounds_is_shown_within_a_second(chromium, tmp_path):
    folder = tmp_path / "runs" / "2026-01-02-calm-reef"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("rounds = 40\n")
    (folder / "metrics.jsonl").write_text(row(0))
    lock = RunFolder(folder)
    lock.lock()
    with contextlib.closing(lock), served(tmp_path / "runs") as (url, _):
        page = chromium.new_page()
        page.goto(f"{url}#{folder.name}")
        until(page, f"{ROUNDS} === 1")
        delays = []
        for t in range(1, 21):
            began = time.monotonic()
            with open(folder / "metrics.jsonl", "a") as log:
                log.write(row(t))
            until(page, f"{ROUNDS} === {t + 1}", 10)
            delays.append(time.monotonic() - began)
        page.close()
    print("seconds from row to page:", sorted(round(d, 3) for d in delays))
    assert max(delays) <= 1.0


def test_the_rows_of_the_page_are_those_of_the_log_over_cuts_and_a_killed_run(chromium, tmp_path):
    """The page is closed and opened, the connection is cut five times, the run is killed and resumed."""
    out = tmp_path / "runs"
    command = [sys.executable, "-c", TRAIN, str(out)]
    with served(out) as (url, port), Relay(port) as relay:
        first = subprocess.Popen(command)
        while not (found := list(out.glob("2*/metrics.jsonl"))):
            TICK.wait(0.05)
        (log,) = found
        address = f"{url.replace(str(port), str(relay.server_address[1]))}#{log.parent.name}"
        page = chromium.new_page()
        page.goto(address)
        for at in (3, 6, 9):
            until(page, f"atoll.view() && atoll.view().next >= {at}")
            relay.cut()
        page.close()
        page = chromium.new_page()
        page.goto(address)
        until(page, "atoll.view() && atoll.view().next >= 20")
        relay.cut()
        first.send_signal(signal.SIGKILL)
        first.wait()
        shown = until(page, "atoll.view().next")
        second = subprocess.Popen([*command, str(log.parent)])
        relay.cut()
        assert second.wait(200) == 0
        until(page, "atoll.view().data.status === 'done' && atoll.view().next === 60")
        series = page.evaluate(
            "Object.fromEntries(Object.entries(atoll.view().series).map(([n, s]) => [n, [s.x, s.y]]))"
        )
        streamed = page.evaluate("atoll.rows.map((row) => row.round)")
        page.close()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["round"] for r in rows] == list(range(60)) and shown >= 20
    assert streamed == sorted(set(streamed)) and streamed[-1] == 59
    for name in {n for r in rows for n in r} - {"round", "fingerprint"}:
        assert series[name] == [[r["round"] for r in rows if name in r], [r[name] for r in rows if name in r]], name


def test_hostile_text_is_text_in_the_page_and_in_the_report(chromium, tmp_path):
    """Clients, folder, title, tags, plan, notes, classes, names of metrics, causes and rows; no script, no request."""
    known = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    folder = tmp_path / "runs" / "2026-01-02-<img src=x onerror=alert(0)>"
    folder.mkdir(parents=True)
    events = [
        {"event": "start", "names": known, "notes": known, "classes": known},
        {"event": "clients", "round": 0, "id": list(range(20)), "loss": [0.5] * 20, "rows": [3] * 20},
        *({"event": "failure", "client": i, "round": 0, "stage": t, "cause": t} for i, t in enumerate(known)),
        {"event": "stop", "status": "failed", "reason": known[4]},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    rows = [{"round": t, "loss": 0.5, "text": known[0], **dict.fromkeys(known, t / 2)} for t in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.toml").write_text(f"data = {json.dumps(known[5])}\nmodel = {json.dumps(known[4])}\n")
    (folder / "environment.json").write_text(json.dumps({"plan": known[0], **dict(zip(known, known, strict=True))}))
    heads = ",".join('"{}"'.format(t.replace('"', '""')) for t in known)
    (folder / "confusion.csv").write_text(f"class,{heads}\n")
    Labels(HOSTILE[1], HOSTILE).write(folder)
    draw(folder)
    with served(tmp_path / "runs") as (url, _):
        origin = url.partition("/?")[0]
        for address in (url, f"{url}#{folder.name}", (folder / "report.html").as_uri()):
            context = chromium.new_context()
            page, wrong = context.new_page(), []
            page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))  # noqa: B023
            page.on("console", lambda line: wrong.append(line.text))  # noqa: B023
            page.on("pageerror", lambda error: wrong.append(str(error)))  # noqa: B023
            page.on("request", lambda r: r.url.startswith((origin, "file:")) or wrong.append(r.url))  # noqa: B023
            page.goto(address)
            until(page, "document.querySelectorAll('main tr, main .tiles div').length > 1")
            page.wait_for_timeout(500)
            page.mouse.move(300, 300)
            assert not wrong
            assert (
                page.evaluate("document.querySelectorAll('img, iframe, object, embed, base, link, main script').length")
                == 0
            )
            text = " ".join(page.evaluate("document.querySelector('main').textContent").split())
            missing = [t for t in known if " ".join(plain(t).split()) not in text]
            assert not missing, address
            context.close()


def plain(text):
    """A text as the page shows it: characters without a shape are dots."""
    return "".join("·" if ord(c) < 32 or 0x2028 <= ord(c) <= 0x202E else c for c in text)


FOCUS = "a[href], button, input, select, summary, [tabindex='0']"


def test_the_keyboard_reaches_each_control_and_moves_a_curve(chromium, demo):
    run = min(path.name for path in demo.glob("2*"))
    with served(demo) as (url, _):
        for address in (url, f"{url}#{run}"):
            page = chromium.new_page(viewport={"width": 1440, "height": 900})
            page.goto(address)
            until(page, "document.querySelectorAll('main tr').length > 1")
            page.wait_for_timeout(500)
            count = page.evaluate(
                f'[...document.querySelectorAll("{FOCUS}")].filter((e) => e.checkVisibility()).length'
            )
            page.evaluate("globalThis.seen = new Set(); globalThis.bare = []")
            for _ in range(count):
                page.keyboard.press("Tab")
                page.evaluate("""() => { const e = document.activeElement; seen.add(e);
                    if (getComputedStyle(e).outlineStyle === "none") bare.push(e.outerHTML.slice(0, 80)); }""")
            assert page.evaluate("[seen.size, bare]") == [count, []], address
        page.locator(".plot").first.focus()
        curve = "[...atoll.view().curves.values()][0].plot.scales.x"
        whole = page.evaluate(f"[{curve}.min, {curve}.max]")
        page.keyboard.press("+")
        page.keyboard.press("Shift+ArrowRight")
        low, high = page.evaluate(f"[{curve}.min, {curve}.max]")
        assert whole[0] < low and high - low == pytest.approx((whole[1] - whole[0]) / 2)
        box = page.locator(".plot .u-over").first.bounding_box()
        page.keyboard.down("Shift")
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + 90, box["y"] + 50, steps=4)
        page.mouse.up()
        page.keyboard.up("Shift")
        assert page.evaluate(f"{curve}.min") < low and page.evaluate(f"{curve}.max") < high
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_access_widths_and_sizes_of_text(chromium, axe, demo, scheme):
    wrong = []
    with served(demo) as (url, _):
        runs = sorted(path.name for path in demo.glob("2*"))
        report = next(demo.glob("2*/report.html")).as_uri()
        for name, address in (("list", url), *((r, f"{url}#{r}") for r in runs), ("report", report)):
            for width in (360, 768, 1440):
                context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
                page = context.new_page()
                page.goto(address)
                until(page, "document.querySelectorAll('main tr').length > 1")
                page.wait_for_timeout(300)
                page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
                over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                wrong += [f"{name} {width}: {over} px too wide"] if over > 0 else []
                wrong += [f"{name} {width}: {size:.1f} px: {text[:40]}" for size, text in page.evaluate(SMALL)]
                if width != 768:
                    page.evaluate(axe)
                    for found in page.evaluate("axe.run(document).then((r) => r.violations)"):
                        first = found["nodes"][0]
                        if found["impact"] in ("serious", "critical"):
                            text = f"{first['html'][:200]} {first['failureSummary'][:300]}"
                            wrong.append(f"{name} {width}: {found['id']}: {text}")
                context.close()
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_the_list_of_runs_does_not_scroll_sideways(chromium, demo):
    """Neither the page nor the box of the table, from a small phone to a wide screen."""
    first = min(demo.glob("2*"))
    Labels("A title that a user has written, with " + "unbroken" * 20, ("first", "x" * 60)).write(first)
    wrong = []
    with served(demo) as (url, _):
        page = chromium.new_page()
        page.goto(url)
        until(page, "document.querySelectorAll('main tr').length > 2")
        for width in (*range(320, 1920, 40), 1920):
            page.set_viewport_size({"width": width, "height": 900})
            over = page.evaluate("""[document.documentElement, ...document.querySelectorAll("main *")]
              .map((e) => [e.tagName, e.scrollWidth - e.clientWidth, getComputedStyle(e).overflowX])
              .filter(([tag, over, x]) => over > 0 && (tag === "HTML" || x === "auto" || x === "scroll"))""")
            wrong += [f"{width}: {over}"] if over else []
        page.close()
    assert not wrong, "\n".join(wrong)
