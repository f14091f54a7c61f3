"""The live table, the plots and the page, for runs of every shape and for hostile names."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from hostile import HOSTILE as TEXTS
from quick_cases import only

import atoll.data
from atoll import recipes, rounds, train
from atoll.data import IID, Clients
from atoll.data.clients import offsets_of
from atoll.data.rows import ArrayRows
from atoll.plan.round import Failure, Report
from atoll.report import LiveTable
from atoll.report.bundle import hash_of
from atoll.report.clients import MOST_COUNTED, MOST_DRAWN, summarize
from atoll.report.draw import draw
from atoll.report.live import Best, columns, that_fit, without_terminal
from atoll.report.page import html_element
from atoll.report.page_data import page_data, to_json
from atoll.report.run_data import Events, RunData

PLAN = "Plan(Train(sgd(0.5), epochs=1, batch=10), aggregator=Mean())"
HOSTILE = ("<script>alert(1)</script>", "[bold red]$x^2$ \\frac", 'a"b\x1b[31m\n', "$", "\u202eevil\x00")
VOID = {"meta", "input"}


def row(t, **metrics):
    counts = {"cohort": 5, "arrived": 5, "failed": 0, "bytes_up": 1200, "bytes_down": 1100, "seconds": 0.01 + 0.001 * t}
    return {"round": t, "fingerprint": f"{t:012x}", **metrics, "gradient_norm": 1 / (t + 1), "lr": 1.0, **counts}


def learned(t):
    return row(t, loss=2 / (t + 1), held_out_loss=2.1 / (t + 1), accuracy=t / (t + 1))


def clients_event(t, ids):
    return {"event": "clients", "round": t, "id": list(ids), "loss": [1.0 / (i + t + 1) for i in ids]}


STOP = {"event": "stop", "status": "done", "reason": "all rounds were run"}


def written(folder, rows, events=(STOP,), config='data = "digits"\nmodel = "mlp"\nrounds = 100\n', plan=PLAN):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "config.toml").write_text(config)
    about = {"atoll": "0.1.0", "plan": plan, "numerics": "lanes", "why": "many clients"}
    (folder / "environment.json").write_text(json.dumps(about))
    return folder


def federation(sizes, classes=3, names=None, held=4):
    sizes = torch.as_tensor(sizes)
    n = int(sizes.sum())
    kind = "classification" if classes else "regression"
    y = torch.arange(n) % classes if classes else torch.linspace(-1, 1, n)
    rows = ArrayRows(torch.zeros(n, 2), y, real=not classes)
    held_out = ArrayRows(torch.zeros(held, 2), y[:held], real=not classes) if held else None
    called = tuple(f"class {c}" for c in range(classes)) if classes else None
    return Clients("set", rows, torch.arange(n), offsets_of(sizes), held_out, kind, called, (2,), names=names)


class Page(HTMLParser):
    """A parsed page: its text, every attribute, and whether each element is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.said = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        last = self.open.pop()
        if last != name:
            raise ValueError(f"</{name}> closes <{last}>")

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.said.append(data)

    @property
    def text(self):
        return " ".join(self.said)


def drawn(folder, data=None):
    """Draw, and check the properties of every report."""
    draw(folder, data)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert page.tags.count("script") == 3 and not {"link", "iframe", "object", "base", "form", "img"} & set(page.tags)
    names = {n for n, _ in page.attributes}
    assert not {"src", "srcset", "href", "style"} & names and not any(n.startswith("on") for n in names)
    own = [part for part in re.split(r"<script.*?</script>|<style>.*?</style>", text, flags=re.S)]
    assert not re.search("url[(]|@import", "".join(own)) or HOSTILE[0] in page.text
    for path in (folder / "plots").glob("*.svg"):
        ElementTree.parse(path)
    return page


ROWS = [learned(t) for t in range(12)]
NAN = [row(0, loss=2.0), row(1, loss=math.nan, held_out_loss=math.inf, accuracy=math.nan), row(2, loss=math.inf)]
SHAPES = {
    "usual": (ROWS, [clients_event(t, range(5)) for t in range(12)], federation([5, 6, 7, 8, 9])),
    "one round": (ROWS[:1], [clients_event(0, range(5))], federation([5] * 5)),
    "no round": ([], [], federation([5] * 5)),
    "no clients given": (ROWS, [], None),
    "nothing held out": ([row(t, loss=10.0**-t) for t in range(30)], [], federation([5] * 5, held=0)),
    "regression": ([row(t, loss=9.0 / (t + 1), rmse=3.0 / (t + 1)) for t in range(9)], [], federation([20] * 5, 0)),
    "equal targets": (ROWS, [], Clients("set", ArrayRows(torch.zeros(6, 1), torch.ones(6), real=True),
                      torch.arange(6), torch.tensor([0, 3, 6]), None, "regression", None, (1,))),
    "several targets": (ROWS, [], Clients("set", ArrayRows(torch.zeros(6, 1), torch.ones(6, 2), real=True),
                        torch.arange(6), torch.tensor([0, 3, 6]), None, "regression", None, (1,))),
    "not finite": (NAN, [{**clients_event(1, range(2)), "loss": [math.nan, math.inf]}], federation([5] * 5)),
    "only not finite": ([row(0, loss=math.nan)], [], federation([5])),
    "equal values": ([row(t, loss=1.0, accuracy=1.0) for t in range(5)], [], federation([5])),
    "one client": (ROWS, [clients_event(t, [0]) for t in range(12)], federation([40])),
    "many clients": (ROWS, [clients_event(t, range(1000)) for t in range(12)], federation([3] * 1000, 10)),
    "many classes": (ROWS, [], federation([60] * 20, 50)),
    "judged now and then": ([row(t, loss=1.0) | ({"accuracy": t / 9} if t % 3 == 2 else {}) for t in range(9)],
                            [], federation([5] * 5)),
    "no client works": ([row(t) | dict.fromkeys(("cohort", "arrived", "bytes_up", "bytes_down"), 0) for t in range(3)],
                       [], None),
    "some arrive": ([{**learned(t), "arrived": 5 - t % 2, "lr": 1 / (t + 1)} for t in range(9)], [], None),
}  # fmt: skip


# The quick run draws these: those that omit most and those that contain most.
EXTREME = ["no round", "not finite", "one client", "many clients", "no client works"]


@pytest.mark.parametrize("shape", only(EXTREME, SHAPES))
def test_every_shape_of_run_is_drawn(shape, tmp_path):
    rows, events, data = SHAPES[shape]
    page = drawn(written(tmp_path / "run", rows, [*events, STOP]), data)
    assert "done" in page.text
    assert f"{len(rows)}" in page.text


def test_the_page_states_the_result(tmp_path):
    baselines = [
        {"event": "baseline", "name": "pooled", "accuracy": 0.97, "held_out_loss": 0.1, "samples": 10},
        {
            "event": "baseline",
            "name": "local",
            "accuracy": 0.61,
            "accuracy_models_sd": 0.12,
            "clients": 3,
            "population": 9,
        },
    ]
    failures = [{"event": "failure", "client": 3, "round": t, "stage": "local", "cause": "OOM"} for t in range(4)]
    start = {"event": "start", "time": "2026-01-02T03:04:05", "notes": ["min_rows: 3 rows were moved."]}
    folder = written(tmp_path / "brisk-heron", ROWS, [start, *failures, *baselines, STOP])
    text = drawn(folder, federation([5] * 5)).text
    for said in (
        "brisk-heron", "gᵢ     = Train(sgd(0.5), epochs=1, batch=10)(θ, dataᵢ)", "0.9700", "0.6100", "local only",
        "min_rows: 3 rows were moved.", "OOM", "client 3", "label divergence", "2026-01-02 03:04:05",
        "all rounds were run",
    ):  # fmt: skip
        assert said in text
    assert {p.stem for p in (folder / "plots").iterdir()} >= {"loss", "metric_accuracy", "seconds", "clients"}


def test_text_from_outside_stays_text(tmp_path):
    failures = [{"event": "failure", "client": i, "round": 0, "stage": n, "cause": n} for i, n in enumerate(HOSTILE)]
    events = [
        {"event": "start", "time": HOSTILE[0], "notes": list(HOSTILE)},
        *failures,
        {"event": "baseline", "name": HOSTILE[0], "accuracy": 0.5},
        {"event": "stop", "status": HOSTILE[0], "reason": HOSTILE[0]},
        clients_event(3, range(5)),
    ]
    rows = [{**r, HOSTILE[0]: 1.0, "../../$x$": 2.0, "fingerprint": HOSTILE[0]} for r in ROWS]
    config = f"data = {json.dumps(HOSTILE[0])}\nmodel = {json.dumps(HOSTILE[1])}\n"
    folder = written(tmp_path / "<b>run", rows, events, config, plan=HOSTILE[0])
    page = drawn(folder, federation([5] * 5, names=HOSTILE))
    assert HOSTILE[0] in page.text
    assert not re.search("[\x00\x1b\u202e]", page.text)
    assert {p.parent for p in tmp_path.rglob("*.svg")} == {folder / "plots"}


def test_log_that_cannot_be_read_whole(tmp_path):
    folder = written(tmp_path / "run", ROWS)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('3\n[1]\n{"round": "x"}\n{"round": 12, "loss": "much", "seconds": null}\n{"round": 13, "lo')
    with open(folder / "events.jsonl", "ab") as file:
        file.write(b'null\n{"event": "clients", "round": 1, "id": [1, 2], "loss": ["a"]}\n')
        file.write(b'{"event": "clients", "round": null}\n{"event": "failure"}\n\xff\n{"ev')
    (folder / "config.toml").write_text("not = [toml")
    (folder / "environment.json").write_text("[]")
    drawn(folder)
    assert [r["round"] for r in RunData.read(folder).rows] == list(range(13))


def test_empty_folder_is_drawn(tmp_path):
    assert "unfinished" in drawn(tmp_path).text


def test_plan_with_foreign_code_is_shown_and_not_imported(tmp_path):
    plan = "Plan(Custom(no_such_module:fn), aggregator=Mean())"
    formula = RunData.read(written(tmp_path / "run", ROWS, plan=plan)).formula
    assert "gᵢ     = Custom(no_such_module:fn)(θ, dataᵢ)" in formula and "no_such_module" not in sys.modules


def test_last_stop_and_last_baseline_count(tmp_path):
    events = [
        {"event": "stop", "status": "interrupted", "reason": "interrupted"},
        {"event": "baseline", "name": "pooled", "accuracy": 0.1},
        {"event": "baseline", "name": "pooled", "accuracy": 0.2},
        STOP,
    ]
    record = RunData.read(written(tmp_path / "run", ROWS, events))
    assert record.events.status == "done" and record.baseline("pooled", "accuracy") == 0.2


def test_best_row():
    def best(name, *values):
        record = RunData("", tuple({"round": t, name: v} for t, v in enumerate(values)), {}, "", {}, Events())
        found = record.best(name)
        return found and found["round"]

    assert best("accuracy", 0.1, math.nan, 0.9, 0.9, math.inf) == 2
    assert best("held_out_loss", 3.0, 1.0, None, 2.0) == 1
    assert best("loss", math.nan) is None
    assert best("lr", 1.0, 2.0) is None


def test_long_logs_are_thinned(tmp_path):
    events = [clients_event(t, range(4)) for t in range(1000)]
    record = RunData.read(written(tmp_path / "run", [learned(t) for t in range(1000)], events))
    at = [c.round for c in record.events.clients]
    assert len(at) <= 120 and at[0] == 0 and at[-20:] == list(range(980, 1000))


def test_huge_federation_is_counted_in_part():
    found = summarize(federation([2] * 300_000, 20))
    assert len(found.ids) == MOST_DRAWN and len(found.every) <= MOST_COUNTED
    assert "2,000 of the 300,000 clients" in found.omitted


def test_clients_with_similar_classes_are_neighbours():
    y = torch.arange(3).repeat(7).repeat_interleave(4)
    rows = ArrayRows(torch.zeros(len(y), 1), y)
    offsets = offsets_of(torch.full((21,), 4))
    data = Clients("set", rows, torch.arange(len(y)), offsets, None, "classification", ("a", "b", "c"), (1,))
    found = summarize(data)
    assert found.shares.argmax(1).tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert found.shares.sum(1) == pytest.approx(1)


def test_text_is_escaped_and_elements_are_not():
    e = html_element
    assert e("p", "<&>", e("b", 1), None, class_='"') == '<p class="&quot;">&lt;&amp;&gt;<b>1</b></p>'


def test_a_report_is_small_and_drawn_in_a_fifth_of_a_second(tmp_path):
    events = [clients_event(t, range(20)) for t in range(30)]
    folder, data = written(tmp_path / "run", [learned(t) for t in range(30)], events), federation([15] * 20, 10)
    draw(folder, data)
    began = time.process_time()
    draw(folder, data)
    assert time.process_time() - began < 0.2
    assert (folder / "report.html").stat().st_size < 250_000


def test_the_data_of_a_report_are_those_of_the_page(tmp_path):
    """The text in the report parses to the answer of `/api/runs/NAME`, for names that would end a script."""
    events = [{"event": "start", "names": list(TEXTS)}, clients_event(0, range(20)), STOP]
    folder = written(tmp_path / "run", [{**ROWS[0], **dict.fromkeys(TEXTS, 1.0)}], events, plan=TEXTS[0])
    draw(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(inside) == json.loads(to_json(page_data(folder)))
    made = Page(text)
    assert not made.open and made.tags.count("script") == 3 and not {"img", "a", "svg:svg"} & set(made.tags)
    policy = next(v for n, v in made.attributes if n == "content" and v.startswith("default-src"))
    for code in re.findall(r"<script>(.*?)</script>", text, re.S):
        assert f"'sha256-{hash_of(code)}'" in policy


@pytest.mark.slow
def test_a_browser_runs_no_hostile_text_and_shows_each_one(tmp_path):
    """Chromium opens the report from disk: the script has drawn it, and the texts are text."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or pytest.skip("no Chromium is installed")
    known = [text.encode("utf-8", "replace").decode() for text in TEXTS]
    events = [{"event": "start", "names": known, "notes": known}, clients_event(0, range(20)), STOP]
    folder = written(tmp_path / "run", [{**r, **dict.fromkeys(known, 1.0)} for r in ROWS], events)
    draw(folder)
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    command = [browser, *words, "--virtual-time-budget=3000", (folder / "report.html").as_uri()]
    page = Page(subprocess.run(command, capture_output=True, text=True, timeout=100).stdout)
    assert page.tags.count("script") == 3 and "canvas" in page.tags and not {"img", "iframe"} & set(page.tags)
    shown = " ".join(page.text.split())
    plain = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e]")
    assert not [text for text in known if " ".join(plain.sub("·", text).split()) not in shown]


# A training in progress


@pytest.fixture(scope="module")
def data():
    key = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=key)
    return atoll.data.arrays(x, (x.sum(1) > 0).long()).split(3, IID())


def test_training_draws_its_report(data, tmp_path):
    run = train("softmax", data, recipes.fedavg(lr=0.1), rounds=2, out=tmp_path, report=False)
    again = train("softmax", data, recipes.fedavg(lr=0.1), rounds=4, out=tmp_path, resume=run.path)
    assert again.path == run.path
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert "Finished 4 rounds" in text and not Page(text).open
    assert [r["round"] for r in RunData.read(run.path).rows] == [0, 1, 2, 3]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def found(t, failures=(), **metrics):
    return Report(t, metrics, 3, 3 - len(failures), failures, 2408, 2400, seconds=0.25)


def shown(training, reports, each=0.1, **options):
    """The output of the table for these reports, `each` seconds between them."""
    file, clock = io.StringIO(), Clock()
    options = {"plain": True, "file": file, "clock": clock} | options
    with LiveTable(**options) as table:
        table.start(training, None)
        for report in reports:
            clock.now += each
            table.round(report)
        table.end(SimpleNamespace(status="done", reason="it is enough", wall=clock.now - 100))
    return file.getvalue()


@pytest.fixture
def training(data):
    return rounds("softmax", data, recipes.fedavg(lr=0.1), rounds=1000)


def lines(text):
    table = text[text.index("round") :].splitlines()[1:]
    return [line.split() for line in table if re.match(r" *\d+ ", line)]


def test_plain_lines(training):
    reports = [found(t, loss=v, held_out_loss=v, accuracy=1 - v) for t, v in enumerate([0.5, 0.4, math.nan, 0.45])]
    text = shown(training, reports, each=2)
    assert "\x1b" not in text and "\r" not in text
    assert [line[:4] for line in lines(text)] == [
        ["0", "0.5000*", "0.5000*", "0.5000*"],
        ["1", "0.4000*", "0.4000*", "0.6000*"],
        ["2", "nan", "nan", "nan"],
        ["3", "0.4500", "0.4500", "0.5500"],
    ]
    assert "3/3" in text and "2.41 kB" in text and "0.25 s" in text
    assert text.splitlines()[-1].startswith("done: it is enough   8.00 s   ↑ 9.63 kB   ↓ 9.60 kB   best accuracy 0.6")
    assert "cohort = Everyone()" in text and f"numerics {training.task.numerics}\n" in text
    assert training.reason not in text  # `atoll show --why` prints it


def test_quick_rounds_are_one_line_a_second_and_the_last_is_there(training):
    reports = [found(t, loss=1.0) for t in range(95)]
    at = [int(line[0]) for line in lines(shown(training, reports, each=0.1))]
    assert at[0] == 0 and at[-1] == 94 and len(at) <= 11
    assert len(lines(shown(training, reports, each=1.5))) > 60
    many = [found(t, loss=1.0) for t in range(3000)]
    assert len(lines(shown(training, many, each=1.0))) < 600


def test_best_is_marked_by_the_direction_of_the_metric():
    best = Best({"accuracy": True, "loss": False})
    marks = []
    for t, (a, b) in enumerate([(0.5, 1.0), (0.7, 2.0), (0.7, 0.5), (math.nan, math.inf), (0.6, 0.5)]):
        marks.append(sorted(best.marked(best.see(found(t, accuracy=a, loss=b)))))
    assert marks == [["accuracy", "loss"], ["accuracy"], ["loss"], [], []]
    assert best.round == {"accuracy": 1, "loss": 2}


@pytest.mark.parametrize("plain", [True, False])
def test_names_and_errors_are_shown_as_text(training, plain):
    failure = Failure(1, 0, "local", "[red]odd[/red] \x1b[31m\x07\nrow")
    text = shown(training, [found(0, (failure,), loss=1.0)], plain=plain)
    assert "client 1 failed in round 0 (local): [red]odd[/red] ·[31m··row" in text
    assert "\x07" not in text and "\x1b[31m" not in text


def test_terminal_is_given_back(training):
    file = io.StringIO()
    with pytest.raises(ZeroDivisionError), LiveTable(plain=False, file=file) as table:
        table.start(training, None)
        table.round(found(0, loss=1.0, held_out_loss=1.0, accuracy=0.5))
        raise ZeroDivisionError
    text = file.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    table.close()


def test_table_on_a_terminal_keeps_the_best_and_the_last(training):
    values = [abs(t - 61) / 100 for t in range(100)]
    text = shown(training, [found(t, loss=v, accuracy=1 - v) for t, v in enumerate(values)], plain=False)
    last = text[text.rindex("─") :]
    at = [int(line.split()[0]) for line in last.splitlines() if re.match(r" *\d+ ", line)]
    assert at[0] == 0 and at[-1] == 99 and 61 in at and len(at) <= 16 and at == sorted(at)
    assert "it is enough" in last


def test_training_is_shown_as_it_goes(data):
    file = io.StringIO()
    with LiveTable(plain=True, file=file) as table:
        train("softmax", data, recipes.fedavg(lr=0.1), rounds=3, out=None, observers=[table])
    assert lines(file.getvalue())[-1][0] == "2" and "Finished 3 rounds" in file.getvalue()


def test_columns_that_fit(data, training):
    every = columns(training)
    assert [c.key for c in every][:4] == ["round", "loss", "held_out_loss", "accuracy"]
    assert [c.key for c in that_fit(every, 200)] == [c.key for c in every]
    assert [c.key for c in that_fit(every, 70)][:4] == ["round", "loss", "held_out_loss", "accuracy"]
    assert [c.key for c in that_fit(every, 5)] == ["round"]
    blind = rounds("softmax", data, recipes.gd(0.1), rounds=1, evaluate_every=0)
    assert [c.key for c in columns(blind)][:3] == ["round", "loss", "gradient_norm"]


@pytest.mark.parametrize(
    ("environ", "plain"),
    [({}, False), ({"CI": "true"}, True), ({"CI": "false"}, False), ({"NO_COLOR": "1"}, True),
     ({"NO_COLOR": ""}, False), ({"TERM": "dumb"}, True)],
)  # fmt: skip
def test_when_plain_lines_are_written(environ, plain):
    assert without_terminal(SimpleNamespace(isatty=lambda: True), environ) == plain
    assert without_terminal(io.StringIO(), environ)
