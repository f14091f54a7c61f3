"""A run that is killed at any point and resumed until it is finished ends in the same bytes as an undisturbed run."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
from faults.forkserver import ForkServer
from quick_cases import only

ROUNDS = 6
# Clients keep their optimizer and their position in the rows, so checkpoints contain segments of client memory.
PLANS = {
    "everyone": {
        "plan": "Plan(Train(adamw(0.01), steps=3, batch=8, keep=('optimizer', 'order')), aggregator=Mean(), "
        "optimizer=sgd(0.7, momentum=0.9, nesterov=True))",
        "every": 0,
    },
    "some": {
        "plan": "Plan(Train(sgd(0.1, momentum=0.5), steps=3, batch=8, keep=('optimizer', 'order')), Mean(), cohort=3)",
        "every": 3,
    },
    "secure": {
        "plan": "Plan(Train(sgd(0.1, momentum=0.5), steps=3, batch=8, keep=('optimizer', 'order')), codec=Clip(1.0), "
        "aggregator=Mean('equal', secure=True))",
        "every": 2,
    },
    # When a round closes, two flights from older models are in progress, with error feedback and downlink state.
    "flying": {
        "plan": "Plan(Train(sgd(0.1, momentum=0.5), steps=3, batch=8, keep=('optimizer', 'order')), Mean(), cohort=5, "
        "codec=ErrorFeedback(TopK(0.05) >> Quantize(8)), downlink=TopK(0.2), pace=Buffered(3), max_failed=1)",
        "every": 2,
        "fleet": "Fleet(HalfNormal(), uplink='10 kB/s', server='50 kB/s', availability=Chance(0.8), dropout=0.2)",
    },
}


@pytest.fixture(scope="module")
def server():
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """A function of a plan: the number of points of an undisturbed run, and its result."""

    @cache
    def of(name):
        answer = server.order(**PLANS[name], folder=str(tmp_path_factory.mktemp(name)), rounds=ROUNDS)
        return answer["points"], result(Path(answer["path"]))

    return of


def result(path):
    """The results that must not depend on kills: bytes of models, metrics without seconds, and client ids of events."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_bytes().splitlines()]
    events = [json.loads(line) for line in (path / "events.jsonl").read_bytes().splitlines()]
    assert [row["round"] for row in rows] == list(range(len(rows)))
    assert [e["round"] for e in events if e["event"] == "clients"] == list(range(len(rows)))
    assert len((path / "metrics.csv").read_text().splitlines()) == len(rows) + 1
    assert not list(path.rglob("*.new"))
    models = [(path / f"{name}.safetensors").read_bytes() for name in ("model", "best")]
    found = [without(e, "time") for e in events if e["event"] in ("clients", "trips", "failure")]
    return models, [without(row, "seconds") for row in rows], found


def without(row, name):
    return {n: v for n, v in row.items() if n != name}


def survive(server, folder, name, kills, rounds=ROUNDS):
    """Kill the run at these points in turn, then let it finish. Return its result."""
    words = {**PLANS[name], "folder": str(folder), "rounds": rounds}
    for kill, half in kills:
        server.order(**words, kill=kill, half=half)
    answer = server.order(**words)
    assert not answer["killed"]
    return result(Path(answer["path"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_points_are_many(undisturbed, name):
    """Runs have enough points that kills fall between rows, states, segments and pointers."""
    assert undisturbed(name)[0] > 60


@pytest.mark.slow
def test_plans_have_results_of_their_own(undisturbed):
    assert undisturbed("everyone")[1] != undisturbed("some")[1]


# Quick: one sixth of the plan with all kinds of state.
POINTS = [
    pytest.param(name, sixth, marks=[] if (name, sixth) == ("flying", 5) else [pytest.mark.slow])
    for name in PLANS
    for sixth in range(6)
]


@pytest.mark.slow
def test_a_client_is_at_work_at_the_kill(undisturbed):
    """The third plan has flights of older model versions, dropouts and compressed downlinks at the kills."""
    _, (_, rows, found) = undisturbed("flying")
    clients = [e for e in found if e["event"] == "clients"]
    assert sum(max(e["staleness"]) > 0 for e in clients) >= ROUNDS // 2
    assert "dropped" in {fate for e in found if e["event"] == "trips" for fate in e["fate"]}
    assert len({size for e in clients for size in e["bytes_down"]}) > 2
    assert len(rows) == ROUNDS


@pytest.mark.parametrize(("name", "sixth"), POINTS)
def test_killed_once(server, undisturbed, tmp_path, name, sixth):
    """One random point in each sixth of the run."""
    points, expected = undisturbed(name)
    draw = random.Random(f"{name} {sixth}")
    kill = points * sixth // 6 + draw.randrange(points // 6) + 1
    assert survive(server, tmp_path, name, [(kill, sixth % 2 == 0)]) == expected


@pytest.mark.parametrize("name", only(["flying"], ["some", "flying"]))
def test_killed_again_and_again(server, undisturbed, tmp_path, name):
    """Kill a run a few points after each resume, while it truncates its logs and writes its first checkpoint."""
    _, expected = undisturbed(name)
    assert survive(server, tmp_path, name, [(55, True), (3, False), (20, True)]) == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_client_memory_of_a_loop_survives_kills(server, tmp_path):
    """Memory of four dtypes and shapes, with a client that fails after it has changed its memory."""
    local = "Custom(importable_parts:remember, batch=16, memory=importable_parts:personal)"
    words = {"plan": f"Plan({local}, Mean(), cohort=4, codec=ErrorFeedback(TopK(0.2)))", "every": 2, "rounds": ROUNDS}
    (tmp_path / "whole").mkdir()
    answer = server.order(**words, folder=str(tmp_path / "whole"))
    points, expected = answer["points"], result(Path(answer["path"]))
    assert points > 40
    for at, kill in enumerate(range(3, points, points // 12)):
        folder = tmp_path / str(kill)
        folder.mkdir()
        server.order(**words, folder=str(folder), kill=kill, half=at % 2 == 0)
        answer = server.order(**words, folder=str(folder))
        assert not answer["killed"] and result(Path(answer["path"])) == expected, f"killed at point {kill}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("half", [False, True])
def test_killed_at_many_points(server, undisturbed, tmp_path, name, half):
    """Every seventh point from the first; or from the fourth, with half of the current write on disk."""
    points, expected = undisturbed(name)
    for kill in range(4 if half else 1, points + 1, 7):
        folder = tmp_path / str(kill)
        folder.mkdir()
        assert survive(server, folder, name, [(kill, half)]) == expected, f"killed at point {kill}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PLANS)
def test_thirty_kills_at_random_moments(server, tmp_path, name):
    """Thirty times `kill -9` after a random time. A run that finishes earlier is compared, and another one starts."""
    words = {**PLANS[name], "rounds": 60}
    expected = result(Path(server.order(**words, folder=str(tmp_path / "alone"))["path"]))
    draw, kills, runs = random.Random(7), 0, 0
    while kills < 30:
        answer = server.order(**words, folder=str(tmp_path / f"run {runs}"), seconds=draw.uniform(0.05, 1.0))
        kills += answer["killed"]
        if not answer["killed"]:
            assert result(Path(answer["path"])) == expected
            runs += 1
    answer = server.order(**words, folder=str(tmp_path / f"run {runs}"))
    assert result(Path(answer["path"])) == expected


PRIVATE = "Plan(Train(sgd(0.1), steps=1, batch=8), Mean('equal', over='expected'), cohort=Poisson(0.5), "
PRIVATE += "codec=Clip(1.0) >> Noise(1.0))"


def lines(folder, name):
    """The number of whole lines of a log of all runs in a folder."""
    files = [path for path in folder.glob(f"*/{name}") if not path.parent.is_symlink()]
    return sum(path.read_bytes().count(b"\n") for path in files)


def released_rounds_are_charged(server, folder, kill, half):
    """Kill a run with noise at a point, and let it finish: at no time are more rounds released than charged."""
    words = {"plan": PRIVATE, "folder": str(folder), "rounds": 3}
    server.order(**words, kill=kill, half=half)
    charged, released = lines(folder, "ledger.jsonl"), lines(folder, "metrics.jsonl")
    assert released <= charged
    answer = server.order(**words)
    assert not answer["killed"] and lines(folder, "metrics.jsonl") == 3
    assert lines(folder, "ledger.jsonl") - charged >= 3 - released


def test_a_killed_run_with_noise_releases_no_round_without_a_charge(server, tmp_path):
    (tmp_path / "whole").mkdir()
    points = server.order(plan=PRIVATE, folder=str(tmp_path / "whole"), rounds=3)["points"]
    assert points > 20 and lines(tmp_path / "whole", "ledger.jsonl") == 3
    (tmp_path / "killed").mkdir()
    released_rounds_are_charged(server, tmp_path / "killed", points // 2, True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("half", [False, True])
def test_a_run_with_noise_is_killed_at_every_point(server, tmp_path, half):
    """Each point once: the odd ones, and the even ones with half of the current write on disk."""
    (tmp_path / "whole").mkdir()
    points = server.order(plan=PRIVATE, folder=str(tmp_path / "whole"), rounds=3)["points"]
    for kill in range(2 if half else 1, points + 1, 2):
        (tmp_path / str(kill)).mkdir()
        released_rounds_are_charged(server, tmp_path / str(kill), kill, half)
