"""`atoll.serve` and `atoll.join`: the doors of Python to a network."""

import signal
import threading

import pandas
import pytest
import torch
from sites import SITES, table

import atoll
from atoll.base.errors import UsageError
from atoll.data import frame

RECIPE = "fedavg(lr=0.5, batch=10)"


def joined(whole):
    return frame(whole, target="ill", by="site").split(held_out=0)


class Sites:
    """Sites with rows in memory, each in a thread."""

    def __init__(self, folder, whole):
        self.folder, self.whole, self.errors, self._threads = folder, whole, [], []

    def join(self, name, token, **options):
        mine = self.whole[self.whole.site == name].drop(columns="site")

        def work():
            try:
                atoll.join(token, mine, home=self.folder / name, **options)
            except Exception as error:
                self.errors.append(error)

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def wait(self):
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not self.errors


def test_a_refused_join_restores_the_signal_handlers(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(UsageError):
        atoll.join(None, "digits", home=tmp_path / "home")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_served_run_has_the_bits_of_train(tmp_path):
    """Rows in memory at three sites, a server with their input only, a loop that stops, and one that continues."""
    whole, sites = table(), None
    data = joined(whole)
    sites = Sites(tmp_path, whole)
    settings = {"rounds": 3, "report": False, "clients": 3, "held_out": 0, "numerics": "fused"}
    run = atoll.train("softmax", data, RECIPE, rounds=3, numerics="fused", out=None)
    with atoll.serve("softmax", data.input, RECIPE, home=tmp_path / "server", **settings) as server:
        for name in SITES:
            sites.join(name, server.invite(name))
        for report in server.rounds():
            assert report.round == 0
            break
    assert server.run.status == "interrupted"
    others = settings | {"clients": 4, "held_out": 0.2}
    with pytest.raises(UsageError, match=r"clients=4, held_out=0\.2, and the run .* is not finished") as error:
        atoll.serve("softmax", data.input, RECIPE, home=tmp_path / "server", **others)
    assert "clients=3, held_out=0" in error.value.required
    with atoll.serve("softmax", data.input, RECIPE, home=tmp_path / "server", **settings) as server:
        assert [report.round for report in server.rounds()] == [1, 2]
    sites.wait()
    assert server.run.rounds == 3
    for ours, theirs in zip(server.run.model.parameters(), run.model.parameters(), strict=True):
        assert ours.equal(theirs)


@pytest.mark.slow
def test_an_input_without_statistics_and_balanced_weights(tmp_path):
    whole = table()
    data = joined(whole)
    bare = atoll.data.frame(whole.drop(columns="site"), target="ill", scale="none").split(held_out=0).input
    sites = Sites(tmp_path, whole)
    settings = {"rounds": 2, "class_weight": "balanced"}
    run = atoll.train("softmax", data, RECIPE, out=None, **settings)
    home = tmp_path / "server"
    more = {"scale": "standard", "clients": 3, "held_out": 0, "report": False}
    with atoll.serve("softmax", bare, RECIPE, home=home, **more, **settings) as server:
        for name in SITES:
            sites.join(name, server.invite(name))
        assert [report.round for report in server.rounds()] == [0, 1]
    sites.wait()
    for ours, theirs in zip(server.run.model.parameters(), run.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_bad_arguments_of_the_doors(tmp_path):
    data = joined(table())
    with pytest.raises(UsageError, match="engine"):
        atoll.serve("softmax", data, RECIPE, home=tmp_path / "a", engine="inprocess")
    with pytest.raises(UsageError, match="is an object"):
        atoll.serve(torch.nn.Linear(4, 2), data, RECIPE, home=tmp_path / "b")
    with pytest.raises(UsageError, match="not enrolled"):
        atoll.join(None, pandas.DataFrame(), home=tmp_path / "c")
    with pytest.raises(UsageError, match="token"):
        atoll.join("atoll1.nothing", pandas.DataFrame(), home=tmp_path / "d")
