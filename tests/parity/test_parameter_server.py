"""The parameter server with one slow worker: asynchronous paces are faster, and all paces converge."""

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # workers import it from there, as in a normal start
    import parameter_server

    yield parameter_server
    del sys.modules["parameter_server"]


@pytest.mark.slow
def test_every_pace_reaches_least_squares_and_only_one_waits(example):
    data = example.regression()
    best, floor = example.least_squares(data)
    ran = {pace: example.run(data, pace, seconds=8.0) for pace in example.PACES}
    for one in ran.values():
        assert float(example.losses(data, one.thetas[-1:])[0]) < 1.01 * floor
        assert float((one.thetas[-1] - best).norm() / best.norm()) < 0.05
    sync, buffered, bounded = (ran[pace].fast for pace in example.PACES)
    assert min(buffered, bounded) > 1.2 * sync  # about 5 on a quiet machine with enough cores


def test_the_slow_worker_is_five_times_slower(example):
    assert example.TIMES_S[example.FAST :] == (5 * example.TIMES_S[0],)
    assert len(set(example.TIMES_S[: example.FAST])) == 1
