"""Build the sdist and the wheel, check them, and use the wheel in a new environment outside of the repository.

python tests/release.py          `make release`; a package index with the dependencies must be reachable

It prints the seconds of each step. The resolutions next to other packages download metadata only and mostly wait for
the index, so three of them run at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_DISTRIBUTIONS = 42
MOST_WHEEL = 2_000_000  # bytes
MOST_PAGE = 150_000  # bytes of the page in the wheel
NEEDED = (
    *("atoll/py.typed", "atoll/__main__.py", "atoll/report/page/main.js", "atoll/report/page/uplot.js"),
    "atoll/report/page/uplot.LICENSE",
)
TOOLS = {"pip", "setuptools", "wheel"}  # of every environment
NEIGHBOURS = (("flwr",), ("opacus",), ("lightning",), ("skorch",), ("transformers", "peft"), ("mlflow", "trackio"))


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="atoll-release-") as name:
        folder = Path(name)
        with step("two builds"):
            files, again = build(folder / "first"), build(folder / "second")
        same = [hashlib.sha256(f.read_bytes()).digest() for f in files]
        require(same == [hashlib.sha256(f.read_bytes()).digest() for f in again], "two builds have equal bytes")
        with step("twine check --strict"):
            run(sys.executable, "-m", "twine", "check", "--strict", *map(str, files), cwd=folder)
        (wheel,) = (f for f in files if f.suffix == ".whl")
        for line in facts(wheel):
            print(line)
        distributions = use(wheel, folder)
        require(len(distributions) <= MOST_DISTRIBUTIONS, f"at most {MOST_DISTRIBUTIONS} distributions")
        print(f"{len(distributions)} distributions: {', '.join(distributions)}")
        shutil.copytree(folder / "first", ROOT / "dist", dirs_exist_ok=True)
    print(f"dist/: {', '.join(f.name for f in files)}")
    return 0


def build(out: Path) -> list[Path]:
    """The sdist and the wheel. The time of their files is that of the last commit."""
    stamp = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    run(*command, cwd=ROOT, env={**os.environ, "SOURCE_DATE_EPOCH": stamp})
    return sorted(out.iterdir())


def facts(wheel: Path) -> list[str]:
    """Check the contents of a wheel, and describe them.

    Raises:
        SystemExit: a file is missing, does not belong there, or is too large.
    """
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.compress_size for info in archive.infolist()}
        (metadata,) = (archive.read(n).decode() for n in sizes if n.endswith(".dist-info/METADATA"))
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/atoll/__init__.py").read_text(), re.M)
    page = sum(size for name, size in sizes.items() if name.startswith("atoll/report/page/"))
    sources = [name for name in sizes if name.startswith("atoll/compute/native/") and name.endswith((".c", ".h"))]
    strange = [n for n in sizes if n.split("/")[0] != "atoll" and ".dist-info/" not in n]
    strange += [n for n in sizes if re.search(r"(^|/)(tests?|__pycache__)/|\.(so|pyc)$", n)]
    require(not strange, f"the wheel contains only the package: {strange}")
    require(
        not [n for n in NEEDED if n not in sizes] and bool(sources), "the wheel contains the page and the C sources"
    )
    require(any(n.endswith(".dist-info/licenses/LICENSE") for n in sizes), "the wheel contains the licence")
    require(version is not None and f"\nVersion: {version[1]}\n" in metadata, "one version")
    require("\n# atoll\n" in metadata, "the long description is the README")
    require(page <= MOST_PAGE, f"the page takes {page:,} bytes, at most {MOST_PAGE:,}")
    require(wheel.stat().st_size <= MOST_WHEEL, f"the wheel has {wheel.stat().st_size:,} bytes, at most {MOST_WHEEL:,}")
    return [f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(sizes)} files, page {page:,} bytes"]


def use(wheel: Path, folder: Path) -> list[str]:
    """Install the wheel into a new environment and run its commands. Returns the names of its distributions."""
    home = folder / "environment"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ATOLL"))}
    pip = (str(home / "bin" / "python"), "-m", "pip")
    with step("a new environment with the wheel"):
        run(sys.executable, "-m", "venv", str(home), cwd=folder)
        run(*pip, "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel), cwd=folder, env=variables)
    listed = json.loads(run(*pip, "list", "--format", "json", cwd=folder, env=variables))
    with step("the commands"):
        try_commands(home, folder, {**variables, "ATOLL_CACHE": str(folder / "cache")})

    def resolve(names: tuple[str, ...]) -> None:
        with step(f"next to {' and '.join(names)}"):
            run(*pip, "install", "-q", "--dry-run", str(wheel), *names, cwd=folder, env=variables)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(resolve, NEIGHBOURS))
    return sorted(each["name"] for each in listed if each["name"] not in TOOLS)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print the seconds of a step when it is done."""
    began = time.monotonic()
    yield
    print(f"{time.monotonic() - began:6.0f} s  {name}", flush=True)


def try_commands(home: Path, folder: Path, variables: dict[str, str]) -> None:
    """Run the first program of the README and the commands, outside of the repository."""
    atoll, work, cache = str(home / "bin" / "atoll"), folder / "work", folder / "cache"
    work.mkdir()

    def command(*words: str, **more: str) -> str:
        print(f"$ atoll {' '.join(words)}", flush=True)
        return run(atoll, *words, cwd=work, env={**variables, **more})

    require(f"-{command('--version').strip()}-" in next(folder.glob("first/*.whl")).name, "the version of the wheel")
    first = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    require(first is not None, "the README has a program")
    run(str(home / "bin" / "python"), "-c", first[1] if first else "", cwd=work, env=variables)
    train = ("run", "--data", "wine", "--clients", "3", "--rounds", "2", "--quiet")
    command(*train, "--set", "numerics=compiled")
    built = sorted(f.name for f in cache.rglob("*.so"))
    command(*train, "--set", "numerics=compiled")
    require(bool(built) and built == sorted(f.name for f in cache.rglob("*.so")), "the C code was built once")
    command(*train, CC="absent", ATOLL_CACHE=str(folder / "none"))
    rows = "\n".join(",".join("1" for _ in range(13)) for _ in range(3))
    (work / "rows.csv").write_text(f"{heads(work)}\n{rows}\n")
    require(len(command("predict", "latest", "rows.csv").strip().splitlines()) == 4, "three predicted rows")
    command("new", "study")
    command("run", "study/experiment.toml", "--rounds", "1", "--quiet")
    page = subprocess.Popen([atoll, "ui", "--json", "--no-open"], cwd=work, env=variables, stdout=subprocess.PIPE)
    require(page.stdout is not None and b'"url"' in page.stdout.readline(), "atoll ui prints its address")
    page.terminate()
    page.communicate(timeout=30)


def heads(work: Path) -> str:
    """The names of the columns that the newest run takes."""
    text = (work / "runs" / "latest" / "input.json").read_text()
    return ",".join(column["name"] for column in json.loads(text)["columns"])


def require(holds: bool, text: str) -> None:
    if not holds:
        raise SystemExit(f"release: not true: {text}")


def run(*words: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"release: {' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
