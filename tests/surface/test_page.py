"""The page: one script of hand-written modules, a strict policy, values as text nodes, a vendored chart library."""

import hashlib
import re
import shutil
import subprocess
from importlib.resources import as_file, files

import pytest

from atoll.report.bundle import bundle, hash_of, live_page

FOLDER = files("atoll.report").joinpath("page")
OURS = ("text", "curve", "table", "run", "main")
UPLOT = {  # uPlot 1.6.32, MIT licence, from the registry of npm
    "uplot.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


def test_the_chart_library_is_the_published_one():
    for name, wanted in UPLOT.items():
        assert hashlib.sha256(FOLDER.joinpath(name).read_bytes()).hexdigest() == wanted
    assert "MIT" in FOLDER.joinpath("uplot.LICENSE").read_text()


def test_no_value_becomes_html_and_no_module_opens_another_origin():
    for name in OURS:
        text = FOLDER.joinpath(f"{name}.js").read_text(encoding="utf-8")
        words = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|createContextual"
        assert not re.findall(words, text), name
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.findall(r'setAttribute\("(on|style|srcdoc)', text), name


def test_the_policy_names_the_only_scripts_and_styles():
    text, policy = live_page()
    made = bundle()
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for script in re.findall(r"<script>(.*?)</script>", text, re.S):
        assert f"'sha256-{hash_of(script)}'" in policy
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert f"style-src 'sha256-{hash_of(style)}'" in policy
    assert "connect-src" not in made.policy(live=False) and "</script" not in made.script + made.library
    assert not re.search(r"^(import|export)\b", made.script, re.M)
    assert len(text.encode()) < 150_000


STUB = """
class Node { constructor(name) { this.name = name; this.children = []; this.listeners = {}; this.attributes = {}; }
  append(...all) { this.children.push(...all); } replaceChildren(...all) { this.children = all; }
  setAttribute(name, value) { this.attributes[name] = value; } getAttribute(name) { return this.attributes[name]; }
  addEventListener(name, act) { this.listeners[name] = act; } querySelectorAll() { return []; }
  find(name) { return this.children.filter((c) => c instanceof Node)
    .flatMap((c) => [...(c.name === name ? [c] : []), ...c.find(name)]); } }
globalThis.Node = Node;
globalThis.ResizeObserver = class { observe() {} };
globalThis.document = { createElement: (name) => new Node(name), createElementNS: (_, name) => new Node(name) };
const same = (a, b) => {
  if (JSON.stringify(a) !== JSON.stringify(b)) throw new Error(JSON.stringify(a) + " is not " + JSON.stringify(b));
};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_sums_of_a_resumed_run_and_hidden_columns_in_the_script(tmp_path):
    """Rows that a stream sends again after a cut do not count twice; newer data with fewer rounds lose no row."""
    with as_file(FOLDER) as folder:
        for name in OURS[:-1]:
            (tmp_path / f"{name}.mjs").write_text(
                re.sub(r"(from \"./\w+)\.js", r"\1.mjs", (folder / f"{name}.js").read_text())
            )
    (tmp_path / "test.mjs").write_text(
        STUB
        + """
const { RunView } = await import("./run.mjs"), { sortedTable } = await import("./table.mjs");
const { visible } = await import("./text.mjs");
const row = (round) => ({ round, loss: 1, bytes_up: 10, arrived: 1, cohort: 1 });
const data = (rounds) => ({
  rounds, status: "running", columns: ["loss"], chief: "loss", sums: { bytes_up: 10 * rounds },
  curves: { loss: [[...Array(rounds).keys()], Array(rounds).fill(1)] } });
const view = new RunView(data(10), true), rows = [];
view.cut(5);
same([view.data.rounds, view.series.loss.x], [5, [0, 1, 2, 3, 4]]);
for (let t = 5; t < 12; t += 1) { rows.push(row(t)); view.add(row(t)); }
same([view.data.rounds, view.data.sums.bytes_up, view.series.loss.x.length], [12, 120, 12]);
view.facts(data(8), rows);
same([view.data.rounds, view.data.sums.bytes_up], [12, 120]);
view.facts(data(13), rows);
view.add(row(12));
same([view.data.rounds, view.data.sums.bytes_up], [13, 130]);
const columns = [{ label: "loss", absent: "not collected" }, { label: "rows", values: [2, 1] }];
const table = sortedTable("", "client", ["b", "a"], columns, {});
for (const button of table.find("button")) button.listeners.click();
same(table.find("tbody")[0].children.length, 2);
same(visible("a\\u202e\\u061c\\ufeff\\u2028\\u0000b\\n\\t\\u00e9"), "a·····b\\n\\té");
"""
    )
    ran = subprocess.run(["node", "test.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
