"""Twelve pictures of the page: four runs, each in light, in dark and on a phone; and two of its top for the manual.

python tests/faces.py [FOLDER [RUN...]]   `make faces` writes them to build/faces; RUN: some of the four

They need playwright, Chromium and Pillow. Those in docs/pictures/page were written by this program.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

RUNS = {
    "demo": ["--baselines", "--rounds", "20", "--clients", "30"],
    "heart": ["--data", "heart", "--model", "softmax", "--baselines", "--rounds", "20"],
    "asynchronous": [
        *("--recipe", "fedbuff(lr=0.3, cohort=10, k=5)", "--clients", "30", "--rounds", "30"),
        *("--fleet", "Fleet(HalfNormal(), dropout=0.05)"),
    ],
    "failing": ["--recipe", "fedavg(lr=1e4, batch=10)", "--clients", "20", "--rounds", "20"],
}
VIEWS = {"light": ("light", 1440), "dark": ("dark", 1440), "phone": ("light", 390)}


def main(folder: Path, names: Sequence[str]) -> int:
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        atoll = [sys.executable, "-m", "atoll"]
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for run, words in ((name, RUNS[name]) for name in names or RUNS):
            out = str(Path(name) / run)
            subprocess.run([*atoll, "run", *words, "--quiet", "--out", out], env=os.environ, check=run != "failing")
            command = [*atoll, "ui", "latest", "--out", out, "--json", "--no-open"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                url = json.loads(server.stdout.readline())["url"] if server.stdout else ""
                for view, (scheme, width) in VIEWS.items():
                    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
                    page.goto(url)
                    page.locator(".tiles div").first.wait_for()
                    page.wait_for_timeout(1500)  # the lower curves are drawn when the page is idle
                    save(page.screenshot(full_page=True), folder / f"{run}-{view}.png")
                    if run == "demo" and view != "phone":
                        page.set_viewport_size({"width": 1100, "height": 760})
                        page.wait_for_timeout(500)
                        save(page.screenshot(), folder / f"top-{view}.png")
                    page.close()
                server.terminate()
        browser.close()
    print(folder)
    return 0


def save(picture: bytes, path: Path) -> None:
    """Write a picture with 32 colours, a quarter of its size; the page has few."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(32, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/faces"), sys.argv[2:]))
