"""The path from `train` to one local step: how many functions of the package it crosses.

A reader who follows a step, and a profile of it, have to pass each of these functions. The limits are the numbers of
today; a shorter path lowers them.
"""

import sys
from pathlib import Path

import pytest
from problems import NO_NATIVE, classification

import atoll
from atoll import recipes

PACKAGE = Path(atoll.__file__).parent

CLIENTS = 16  # from this number on, the engine also times its chunks
# numerics: the module and the function that make a step, and the largest number of functions up to it, both included
BACKENDS = {
    "loop": ("bound", "step", 14),
    "fused": ("fused", "step", 15),
    "compiled": ("compiled", "_run", 16),
}


def functions_of_the_stack(frame):
    """The functions of the package on a stack, outermost first."""
    found = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            found.append(f"{'.'.join(file.relative_to(PACKAGE).with_suffix('').parts)}.{frame.f_code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


def path_to_step(numerics):
    """The functions from `train` to the first step of a backend, both included."""
    module, name, _ = BACKENDS[numerics]
    path = []

    def watch(frame, event, argument):
        code = frame.f_code
        if event == "call" and not path and code.co_name == name and Path(code.co_filename).stem == module:
            found = functions_of_the_stack(frame)
            if any(function.endswith(".gather") for function in found):  # not the trial step that chooses the backend
                path.extend(found)

    data = classification((10,) * CLIENTS)
    plan = recipes.fedavg(0.1, batch=10)
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        atoll.train("softmax", data, plan, rounds=1, out=None, numerics=numerics, evaluate_every=0)
    finally:
        sys.setprofile(before)
    return path


@pytest.mark.parametrize("numerics", BACKENDS)
def test_path_to_a_step_is_short(numerics):
    if numerics == "compiled" and NO_NATIVE:
        pytest.skip(NO_NATIVE)
    path = path_to_step(numerics)
    assert path, f"no function {BACKENDS[numerics][:2]} made a step: name the one that does in BACKENDS"
    assert path[0].endswith("train")
    assert len(path) <= BACKENDS[numerics][2], "\n".join(path)
