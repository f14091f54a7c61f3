"""The pages are correct: code runs and prints the shown output, commands parse, and links have a target.

A page is README.md, ARCHITECTURE.md or a file of docs/. A block is the text between fences. The word after the fence
determines the check:

    python      all blocks of a page run in order, in one namespace and an empty working folder. The block that quotes
                `step` is an exception and has its own test
    text        directly after a python block: the output of that block; `…` matches any text
    sh          every `atoll` and `make` command in it exists and accepts its arguments
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import atoll
from atoll.cli.app import app
from atoll.plan.registry import PARTS
from atoll.plan.round import step
from atoll.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(?P<edge>`{3,})(?P<word>[\w{}-]*)[^\n]*\n(?P<code>.*?)^(?P=edge)[ \t]*$", re.M | re.S)
QUOTED = "def step("


class Block(NamedTuple):
    """A fenced block: its word, its text, its first line, and whether another block is directly before it."""

    word: str
    code: str
    line: int
    behind: bool


def blocks(page: Path) -> list[Block]:
    found, end, text = [], -1, page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        behind = end >= 0 and not text[end : match.start()].strip()
        found.append(Block(match["word"], match["code"], text.count("\n", 0, match.start("code")), behind))
        end = match.end()
    return found


def named(pages: list[Path], slow: Collection[str] = ()) -> dict[str, list]:
    marked = [pytest.param(page, marks=pytest.mark.slow) if page.name in slow else page for page in pages]
    return {"argvalues": marked, "ids": [str(page.relative_to(ROOT)) for page in pages]}


RUN = [page for page in PAGES if any(block.word == "python" for block in blocks(page))]
LONG = {"asynchrony.md", "compression.md", "fair_evaluation.md", "formula.md", "models.md", "privacy.md", "runs.md"}
LONG |= {"engines.md", "schedules_and_stopping.md", "sklearn.md", "unequal_data.md"}
LONG |= {"deploy.md", "log_to_a_tracker.md", "tables.md", "tune_a_rate.md"}  # pages with long training
TYPED = [page for page in PAGES if any(block.word == "sh" for block in blocks(page))]


# python


def reduced(match: re.Match[str]) -> str:
    """A number of rounds or clients with a limit."""
    return f"{match[1]}={min(int(match[2]), {'rounds': 3, 'clients': 20}[match[1]])}"


@pytest.mark.parametrize("page", **named(RUN, LONG))
def test_code_runs_and_prints_the_shown_output(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for variable in ("ATOLL_DATA", "ATOLL_DATASET", "ATOLL_OUT"):
        monkeypatch.delenv(variable, raising=False)
    if page.name not in ("start.md", "runs.md"):  # draws reports; other tests check that any run can be drawn
        monkeypatch.setattr(
            importlib.import_module("atoll.report.draw"), "draw", lambda folder, data=None, formats=(): None
        )
    compared = any(word == "text" and behind for word, _, _, behind in blocks(page))
    space: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for word, code, line, behind in blocks(page):
        if word == "python" and not code.startswith(QUOTED):
            if not compared:  # no output is compared, so a few rounds of some clients are enough
                code = re.sub(r"\b(rounds|clients)=(\d+)", reduced, code)
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                # Blank lines before the code, so that a traceback shows the line of the page.
                exec(compile("\n" * line + code, str(page), "exec"), space)
            printed = output.getvalue()
        elif word == "text" and behind and printed:
            checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            shown = code.replace("…", "...")
            assert checker.check_output(shown, printed, flags), f"{page.name}:{line + 1} printed\n{printed}"
            printed = ""


def test_every_page_of_the_manual_is_found():
    assert {"README.md", "start.md", "formula.md", "plans.md"} <= {page.name for page in RUN}


# sh


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as lists of words, without comments, leading variables and pipes."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word[0] in ";|&>":
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_command(words: list[str]) -> None:
    """Refuse a command of atoll or make that does not exist or does not accept its arguments."""
    if words[0] == "make":
        verbs = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(verbs), words
    if words[0] != "atoll" or words[1:] in ([], ["--help"], ["--version"], ["--install-completion"]):
        return
    command, bound, *_ = app.parse_args(words[1:], print_error=False, exit_on_error=False)
    assert words[1] in app and command is app[words[1]].default_command, f"{words}: no such command"
    flags = bound.arguments.get("flags")
    if flags is not None and "mine:" not in " ".join(words):  # the reader's own file
        it = flags.experiment(None, trust=True)
        it.override(recipe=it.recipe or "fedavg()").plan()


@pytest.mark.parametrize("page", **named(TYPED))
def test_commands_are_taken(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text("def net(): ...\ndef train(model, loader, ctx): ...\n")  # the reader's own file
    for word, code, _, _ in blocks(page):
        for words in commands(code) if word == "sh" else ():
            check_command(words)


@pytest.mark.parametrize("page", **named(PAGES))
def test_commands_in_the_text_exist(page):
    """`atoll word --flag` in backticks: the command and its flag exist."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`(atoll [a-z][^`\n]*)`", text):
        words = span.split()[1:]
        assert words[0] in app, span
        known = {name for argument in app[words[0]].assemble_argument_collection() for name in argument.names}
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= known | {"--help"}, span


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("atoll runs ; atoll show A   # why", [["atoll", "runs"], ["atoll", "show", "A"]]),
        ('A=1 atoll run --split "IID()" | tee x', [["atoll", "run", "--split", "IID()"], ["tee", "x"]]),
        ("atoll run \\\n  --quiet", [["atoll", "run", "--quiet"]]),
        ("# nothing", []),
    ],
)
def test_shell_lines_are_read(text, expected):
    assert list(commands(text)) == expected


@pytest.mark.parametrize(
    "line", ["atoll rum", "atoll run --nope", "atoll run --rounds x", "make nothing", "atoll replay A"]
)
def test_wrong_lines_are_found(line):
    with pytest.raises(Exception, match=r"."):
        check_command(line.split())


# Quoted source code


def without_docstring(function) -> str:
    """The source of a function without its docstring."""
    source = inspect.getsource(function)
    first = ast.parse(source).body[0].body[0]
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    lines = source.splitlines(keepends=True)
    return "".join(lines[: first.lineno - 1] + lines[first.end_lineno :])


def test_readme_shows_step_verbatim():
    """One block of the README equals `atoll.plan.round.step`, character by character, without its docstring."""
    shown = [block.code for block in blocks(ROOT / "README.md") if block.code.startswith(QUOTED)]
    assert shown == [without_docstring(step)]


def test_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [recipe.__name__ for recipe in RECIPES if f"`{recipe.__name__}`" not in text]


def test_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", text))
    names = {name for name in atoll.__all__ if name[0] != "_"} | {part.__name__ for part in PARTS.values()}
    assert not names - words


def test_the_members_of_the_reference_exist():
    """Sphinx leaves out an unknown member without a warning."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    found = re.findall(r"auto(?:class|module):: ([\w.]+)\n   :members: ((?:.*,\n)*.*)", text)
    missing = [f"{o}.{m}" for o, all_of in found for m in re.findall(r"\w+", all_of) if not _has(o, m)]
    assert len(found) > 20 and not missing


def _has(path, member):
    """Whether a class or module has a member; a module may have it in a package below it."""
    module, _, name = path.rpartition(".")
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        owner = getattr(importlib.import_module(module), name)
    return hasattr(owner, member)


def test_decisions_are_in_the_manual():
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    assert not [file.name for file in (ROOT / "decisions").glob("*.md") if file.name not in text]


# Links and paths


def test_guards_of_the_invariants_exist():
    """Every path in backticks in the column of guards exists; a bare name is in the folder of the previous path."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("| invariant | guard |")[2].partition("\n\n")[0]
    missing = []
    for row in table.splitlines()[2:]:
        folder = ROOT
        for span in re.findall(r"`([^`]+)`", row.strip("|").rsplit("|", 1)[1]):
            if span.startswith("make "):
                check_command(span.split())
            else:
                path = (ROOT if "/" in span else folder) / span
                folder = path.parent
                missing += [] if path.exists() else [span]
    assert not missing


@pytest.mark.parametrize("page", **named(PAGES))
def test_links_lead_to_files(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    inside = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    assert not [link for link in inside if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", **named(PAGES))
def test_pictures_are_there_and_small(page):
    for name in re.findall(r"\((pictures/[\w/-]+\.\w+)\)|\} (pictures/[\w/-]+\.\w+)", page.read_text(encoding="utf-8")):
        file = page.parent / "".join(name)
        assert file.stat().st_size < 60_000, file.name


def test_make_bench_runs_each_benchmark_with_short_settings():
    """Without arguments some benchmarks take hours. `trainings.py` is a part of `bits.py`."""
    lines = (ROOT / "benchmarks" / "short.txt").read_text().splitlines()
    programs = {p.name for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()} - {"trainings.py"}
    assert [line.split()[0] for line in lines] == sorted(programs)
    for line in lines:
        name, *words = line.split()
        flags = [word for word in words if word.startswith("--")]
        assert len(words) and all(f'"{flag}"' in (ROOT / "benchmarks" / name).read_text() for flag in flags), line
