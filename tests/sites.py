"""A server and its sites as threads of one process, for quick tests. Each site has rows of its own."""

import queue
import threading
from pathlib import Path

import numpy as np
import pandas

from atoll.net.home import ServerHome
from atoll.net.join import join_federation
from atoll.net.spec import Server
from atoll.training.experiment import Experiment
from atoll.training.serve import serve_run

SITES = ("north", "south", "west")


def table(rows=90, seed=3):
    """A table of three sites, in the order of their names at first."""
    draw = np.random.default_rng(seed)
    age, city = draw.normal(50, 10, rows).round(1), draw.choice(["Oslo", "Rome", "Bonn"], rows)
    ill = np.where(age + 8 * (city == "Rome") + draw.normal(0, 5, rows) > 52, "yes", "no")
    return pandas.DataFrame({"age": age, "city": city, "ill": ill, "site": [SITES[i % 3] for i in range(rows)]})


def write_tables(folder, whole=None):
    """One file for each site, and the joined table all.csv."""
    whole = table() if whole is None else whole
    whole.to_csv(folder / "all.csv", index=False)
    for name in SITES:
        whole[whole.site == name].drop(columns="site").to_csv(folder / f"{name}.csv", index=False)
    return folder


def experiment(**settings):
    texts = {name.replace("__", "."): str(value) for name, value in settings.items()}
    return Experiment().with_settings(texts)


class Served:
    """One run: its server and its sites, each in a thread. `results` has the run, or the exit code or error of each."""

    def __init__(self, folder, it, **spec):
        self.folder, self.home = Path(folder), Path(folder) / "server"
        self.results, self.events, self._threads = {}, {}, []
        address = queue.Queue()

        def notify(facts):
            self.events.setdefault("server", []).append(facts)
            if facts["event"] == "listening":
                address.put(facts["address"])

        def serve():
            try:
                self.results["server"] = serve_run(it, Server(str(self.home), drain=5.0, **spec), notify=notify)[0]
            except BaseException as error:
                self.results["server"] = error
            address.put(None)

        self._start(serve)
        self.address = address.get(timeout=60)
        assert self.address, self.results["server"]

    def _start(self, call):
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        self._threads.append(thread)

    def invite(self, name):
        at = ServerHome.open(self.home, serve=False)
        try:
            return at.invite(name, self.address, None, 1.0).text()
        finally:
            at.close()

    def join(self, name, data, **options):
        token = self.invite(name)

        def join():
            seen = self.events.setdefault(name, [])
            try:
                home = self.folder / name
                self.results[name] = join_federation(token, home, str(data), once=True, notify=seen.append, **options)
            except BaseException as error:
                self.results[name] = error

        self._start(join)

    def wait(self, seconds=30.0):
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive(), (self.results, self.events)
        return self.results
