"""Every measured threshold states its machine and is used; tests/identities checks that sizes change no bit."""

import re
from pathlib import Path

from atoll.compute import limits

SRC = Path(limits.__file__).parents[1]
TEXT = Path(limits.__file__).read_text(encoding="utf-8")
NAMES = re.findall(r"^([A-Z_]+) = ", TEXT, re.M)


def test_every_threshold_states_its_machine():
    blocks = [block for block in TEXT.split("\n\n") if re.search(r"^[A-Z_]+ = ", block, re.M)]
    assert not [block for block in blocks if not (block.startswith("# ") and re.search("machine|GPU", block, re.I))]


def test_every_threshold_is_used():
    code = "".join(path.read_text(encoding="utf-8") for path in SRC.rglob("*.py") if path.name != "limits.py")
    assert len(NAMES) >= 20
    assert not [name for name in NAMES if f"limits.{name}" not in code]
