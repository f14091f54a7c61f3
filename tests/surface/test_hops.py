"""The path from `train` to one local step crosses at most 10 functions of the package.

A reader of the code and a profile of a step pass each of these functions.
"""

import sys
from pathlib import Path

import pytest
from problems import NO_NATIVE, classification

import atoll
from atoll import recipes

PACKAGE = Path(atoll.__file__).parent

CLIENTS = 16  # from this number on, the engine also times its chunks
MOST = 10  # functions from `train` to the step of a backend, both included
# The module of each backend whose function `step` makes a step.
BACKENDS = {"loop": "autograd", "fused": "fused", "compiled": "compiled"}


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
    path = []

    def watch(frame, event, argument):
        code = frame.f_code
        if (
            event == "call"
            and not path
            and code.co_name == "step"
            and Path(code.co_filename).stem == BACKENDS[numerics]
        ):
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
    assert path, f"no function `step` of {BACKENDS[numerics]} ran: correct BACKENDS"
    assert path[0].endswith("train")
    assert len(path) <= MOST, "\n".join(path)
