"""Programs of users under `mypy --strict`: README and manual pass, mistakes give exactly the expected complaints.

One process of mypy checks all programs. It uses the cache of `make check`, so a second call takes a few seconds.
A line of `tests/typing/mistakes.py` that ends with `# error: WORDS [code]` gives that complaint and no other.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # `make check` runs this file
ROOT = Path(__file__).parents[2]
TYPING = ROOT / "tests" / "typing"
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```python\n(?P<code>.*?)^```", re.M | re.S)
COMPLAINT = re.compile(r"^(?P<file>[^:]+):(?P<line>\d+): error: (?P<text>.*)$", re.M)
EXPECTED = re.compile(r"# error: (?P<words>.*) (?P<code>\[[\w-]+\])$")


def program(page: Path) -> str:
    """The Python blocks of a page as one module whose line numbers are those of the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for match in FENCE.finditer(text):
        if not match["code"].startswith("def step("):  # a quotation
            first = text.count("\n", 0, match.start("code"))
            code = match["code"].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def complaints(tmp_path_factory) -> dict[str, list[tuple[int, str]]]:
    """The complaints of `mypy --strict` about all programs, by the name of the file."""
    folder = tmp_path_factory.mktemp("programs")
    for page in PAGES:
        (folder / f"page_{page.stem.lower()}.py").write_text(program(page), encoding="utf-8")
    words = ["-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--strict", "--no-error-summary"]
    files = [*sorted(folder.glob("*.py")), *sorted(TYPING.glob("*.py"))]
    line = [sys.executable, *words, *map(str, files)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found: dict[str, list[tuple[int, str]]] = {file.name: [] for file in files}
    for match in COMPLAINT.finditer(done.stdout):
        found.setdefault(Path(match["file"]).name, []).append((int(match["line"]), match["text"]))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_of_the_pages_pass(page, complaints):
    assert complaints[f"page_{page.stem.lower()}.py"] == []


def test_foreign_parts_pass(complaints):
    assert complaints["foreign_parts.py"] == []


def expected(file: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if (match := EXPECTED.search(line)) is not None:
            yield number, match["words"], match["code"]


def test_mistakes_give_exactly_the_expected_complaints(complaints):
    wanted, given = list(expected(TYPING / "mistakes.py")), complaints["mistakes.py"]
    assert [line for line, _, _ in wanted] == [line for line, _ in given]
    for (line, words, code), (_, text) in zip(wanted, given, strict=True):
        assert words in text and text.endswith(code), f"line {line}: {text}"
