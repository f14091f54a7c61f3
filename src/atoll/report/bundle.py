"""The script and the style of the page as one text each, with the hashes that a content security policy names.

The modules in `page/` import only each other. Here their imports and exports are dropped, so that one script contains
them all, in the order of `_MODULES`.

Tests: tests/surface/test_page.py
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

_MODULES = ("text", "curve", "table", "run", "main")  # a module imports only modules before it
_STYLES = ("colours", "uplot", "page", "chart")


class Bundle(NamedTuple):
    """The texts of the page: the library of the charts, the script, the style."""

    library: str
    script: str
    style: str

    def policy(self, live: bool) -> str:
        """The content security policy. `live`: of the server; else of a file, which opens no connection."""
        scripts = " ".join(f"'sha256-{hash_of(text)}'" for text in (self.library, self.script))
        rules = f"default-src 'none'; script-src {scripts}; style-src 'sha256-{hash_of(self.style)}'; base-uri 'none'"
        more = "; connect-src 'self'; frame-ancestors 'none'" if live else ""
        return f"{rules}; form-action 'none'{more}"


def hash_of(text: str) -> str:
    """The SHA-256 of a text in base64, as a policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@lru_cache(maxsize=1)
def bundle() -> Bundle:
    """Read the files of the page once."""
    folder = files("atoll.report").joinpath("page")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    modules = [re.sub(r"^(import [^;]*;\n|export )", "", read(f"{name}.js"), flags=re.M) for name in _MODULES]
    script = f'"use strict";\n(() => {{\n{"".join(modules)}}})();\n'
    return Bundle(read("uplot.js"), script, "".join(read(f"{name}.css") for name in _STYLES))


@lru_cache(maxsize=1)
def live_page() -> tuple[str, str]:
    """The page of the server without data, and its content security policy."""
    made = bundle()
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<meta name="color-scheme" content="light dark"><title>atoll</title><style>{made.style}</style>'
    body = '<main id="page"><p>The page needs JavaScript. Without it, open report.html of a finished run.</p></main>'
    scripts = f"<script>{made.library}</script><script>{made.script}</script>"
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}{scripts}</body></html>\n'
    return text, made.policy(live=True)
