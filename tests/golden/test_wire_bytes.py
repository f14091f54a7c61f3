"""The frames of the network equal the recorded ones. `python tests/golden/test_wire_bytes.py` records them again."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from net_messages import DOWN, STEP, STEP_CAP, UP

from atoll.net import wire

FILE = Path(__file__).with_name("wire.json")
MESSAGES = {**UP, **DOWN, "Step": STEP}


def frames() -> dict[str, str]:
    return {name: wire.encode_frame(message, STEP_CAP).hex() for name, message in MESSAGES.items()}


def test_frames_are_the_recorded_ones():
    recorded = json.loads(FILE.read_text())
    assert recorded.keys() == MESSAGES.keys()
    assert {name for name, frame in frames().items() if recorded[name] != frame} == set()


@pytest.mark.parametrize("name", MESSAGES)
def test_recorded_frames_are_read(name):
    frame = bytes.fromhex(json.loads(FILE.read_text())[name])
    assert (wire.decode_up if name in UP else wire.decode_down)(frame, STEP_CAP) == MESSAGES[name]


def test_work_ids_are_the_recorded_ones():
    ids = [
        wire.work_id("2026-11-30-calm-bay", kind, client, version, repeat, "Plan()", bytes(32)).hex()
        for kind, client, version, repeat in (("round", 0, 0, 0), ("evaluate", 0, 0, 0), ("round", 1, 2, 3))
    ]
    assert ids == [
        "5ab7965c24d7cc2677c050d06df93ee2",
        "e07c33532d8fdc6c8872db9448571844",
        "2a629be7efe07c32f93c0d7e40b00a41",
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(frames(), indent=1) + "\n")
