"""The page: one script of hand-written modules, a strict policy, values as text nodes, a vendored chart library."""

import hashlib
import re
from importlib.resources import files

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
