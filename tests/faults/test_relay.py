"""Relays: the bits of a run without them, one model down and one sum up, and kills."""

import json
import queue
import threading
from contextlib import suppress
from types import SimpleNamespace

import pandas
import pytest
from msgspec import structs
from net_messages import work
from network import Federation, comparable, eventually
from quick_cases import only
from sites import SITES, Served, experiment, write_tables
from test_federation import Hosted, alone, client, rows
from test_links import Connection, Fault, Link
from test_sites import SMALL
from test_statistics import bare

from atoll.base.errors import AtollError, RunError, UsageError
from atoll.data import csv
from atoll.engine.protocols import RunOptions
from atoll.net import wire
from atoll.net.coordinator import Coordinator, Limits
from atoll.net.engine import ServerEngine
from atoll.net.home import ServerHome
from atoll.net.join import _member, join_federation, run_relay
from atoll.net.loop import run_loop
from atoll.net.policy import Policy
from atoll.net.relay import Gathering, Relay
from atoll.net.relays import RelayWork
from atoll.net.server import _ROUTES, Listener
from atoll.net.site import Prepared, Site
from atoll.net.spec import Server
from atoll.net.store import Accepted
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient
from atoll.plan.plan import Plan
from atoll.plan.sampler import Weighted
from atoll.training.serve import serve_run


class Relayed:
    """A relay in a thread."""

    def __init__(self, token, home):
        self.home, self.events, self.codes = home, [], {}
        address = queue.Queue()

        def notify(facts):
            self.events.append(dict(facts))
            if facts["event"] == "listening":
                address.put(facts["address"])

        self._notify = notify
        self.thread = threading.Thread(target=self.start, args=(token,), daemon=True)
        self.thread.start()
        assert address.get(timeout=30), self.codes

    def start(self, token):
        try:
            self.codes["code"] = run_relay(token, Server(str(self.home), drain=5.0), once=True, notify=self._notify)
        except BaseException as error:
            self.codes["code"] = error

    def tokens(self, *names):
        at = ServerHome.open(self.home, serve=False)
        try:
            return [at.invite(name, None, None, 1).text() for name in names]
        finally:
            at.close()


def relayed(folder, settings, relays=2, clients=2, gone=(), spare=0, through=lambda address: address, **spec):
    """Serve a run to relays with clients. Returns the run, the relays and the events of the clients.

    Args:
        gone: the numbers of clients that end by an error.
        spare: further clients of each relay, for which the run has no place.
        through: the address that the relays dial, by that of the server.
    """
    server = Hosted(folder / "server", {**settings, "clients": relays * clients}, **spec)
    at = ServerHome.open(folder / "server", serve=False)
    dialled = through(server.address)
    tokens = [at.invite(f"relay-{i}", dialled, None, 1, relay=clients).text() for i in range(relays)]
    at.close()
    made = [Relayed(token, folder / f"relay-{i}") for i, token in enumerate(tokens)]
    seen, joined = [], []
    for i, relay in enumerate(made):
        for k, token in enumerate(relay.tokens(*(f"site-{k}" for k in range(clients + spare)))):
            seen.append([])
            joined.append(client(token, folder / f"site-{i}-{k}", seen[-1]))
    run = server.run()
    for number, (thread, codes) in enumerate([*joined, *((relay.thread, relay.codes) for relay in made)]):
        thread.join(30)
        assert codes.get("code") == 0 or number in gone, codes
    return run, made, seen


CASES = {
    "error feedback": {
        "model": "softmax",
        "recipe": "fedavg(lr=0.5, batch=50)",
        "plan__codec": "ErrorFeedback(TopK(0.1) >> Quantize(4, bucket=256))",
        "numerics": "fused",
    },
    "a correction with memory": {"model": "softmax", "recipe": "scaffold(lr=0.1, batch=50)"},
    "long messages": {"model": "2nn", "recipe": "fedavg(lr=0.5, batch=100)", "numerics": "fused"},
    "a cohort of some": {"model": "softmax", "recipe": "fedadam(lr=0.1, cohort=3)", "split": "Dirichlet(0.3)"},
}


@pytest.mark.parametrize("case", only(["error feedback"], CASES))
def test_relays_give_the_bits_of_a_run(case, tmp_path):
    quick = case == "error feedback"
    settings, sizes = {"rounds": 2 if quick else 4, "seed": 4, **CASES[case]}, (1, 2) if quick else (2, 2)
    run, _, _ = relayed(tmp_path, settings, *sizes)
    reference = alone(tmp_path, settings, sizes[0] * sizes[1])
    assert rows(run) == rows(reference)
    models = [(one.path / "model.safetensors").read_bytes() for one in (run, reference)]
    assert models[0] == models[1]
    at = ServerHome.open(tmp_path / "server", serve=False)
    assert at.verify() == []
    at.close()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["softmax", "2nn"])
def test_a_relay_receives_one_model_and_sends_one_sum_for_any_number_of_clients(model, tmp_path, monkeypatch):
    sent, fetched = [], []
    queued, blob = Listener._queue, Listener._blob

    def count(self, channel, frame):
        kind = type(wire.decode_down(frame)).__name__
        sent.append((self.home.name, kind, len(frame)))
        return queued(self, channel, frame)

    async def serve(self, request, hash):
        fetched.append((self.home.name, len(self.blobs.get(hash, b""))))
        return await blob(self, request, hash)

    monkeypatch.setattr(Listener, "_queue", count)
    monkeypatch.setitem(_ROUTES, ("GET", "/v1/blobs/", 64), serve)
    up, down = {}, {}
    for clients in (2, 8):
        sent.clear()
        fetched.clear()
        settings = {"model": model, "recipe": "fedavg(lr=0.5, batch=200)", "numerics": "fused", "rounds": 2}
        _, (relay,), _ = relayed(tmp_path / str(clients), settings, 1, clients)
        up[clients] = [event["bytes"] for event in relay.events if event["event"] == "work"]
        frames = [size for home, kind, size in sent if home == "server" and kind == "Gather"]
        below = [size for home, kind, size in sent if home != "server" and kind == "Work"]
        models = [size for home, size in fetched if home == "server" and size > wire.MAX_INLINE]
        assert len(frames) == 2 and len(below) == 2 * clients and len(models) == (3 if model == "2nn" else 0)
        assert max(frames) - max(below) <= 16 + 8 * clients
        down[clients] = models  # two versions and the final model
    assert down[2] == down[8]
    numbers = 650 if model == "softmax" else models[0] // 4
    assert all(size <= 24 * numbers for sizes in up.values() for size in sizes), up


def test_the_home_of_a_relay_is_no_home_of_a_server(tmp_path):
    at = ServerHome.open(tmp_path / "ward")
    at.database.put("address", "127.0.0.1:1")
    at.database.put("relay", "1")
    assert [at.invite(name, None, None, 1) for name in ("north", "south")]
    assert [client.id for client in at.database.clients()] == [wire.RELAYS, wire.RELAYS + 1]
    at.database.renumber({"north": 4})
    for numbers in ({"north": 5}, {"south": 4}):
        with pytest.raises(RunError, match="The root calls"):
            at.database.renumber(numbers)
    assert [(c.id, c.name) for c in at.database.clients()] == [(4, "north"), (wire.RELAYS + 1, "south")]
    at.close()
    with pytest.raises(UsageError, match="home of a relay"):
        ServerEngine(Server(str(tmp_path / "ward")), RunOptions())
    root = ServerHome.open(tmp_path / "root")
    root.database.put("address", "127.0.0.1:1")
    ward = root.database.invite("ward", bytes(32), 1 << 40, relay=True, leaves=3)
    root.database.invite("west", bytes(range(32)), 1 << 40, limit=3)
    assert ward == wire.RELAYS
    assert root.database.number_leaves("ward", ("north", "south", "east"), 3) == (1, 2, wire.RELAYS)
    assert root.database.number_leaves("ward", ("south", "north"), 3) == (2, 1)
    for name, relay, fault in (("ward", None, "with --relay"), ("west", 2, "without --relay")):
        with pytest.raises(UsageError, match=fault):
            root.invite(name, None, None, 1, relay=relay)
    with pytest.raises(UsageError, match="client of the relay 'ward'"):
        root.database.revoke("ward/north")
    root.close()


class Killed(BaseException):
    """The end of a relay at a failpoint. Nothing that happens afterwards writes to its disk."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["relay.prepared", "relay.settled", "settle.inserted"])
def test_a_relay_that_ends_at_a_failpoint_gives_the_same_bits(place, tmp_path, monkeypatch):
    passed, again = [], []

    def end(name):
        if name == place:
            passed.append(name)
            if len(passed) == 3:
                raise Killed

    for module in ("relay", "store"):
        monkeypatch.setattr(f"atoll.net.{module}.failpoint", end)
    started = Relayed.start

    def restart(self, token):
        started(self, token)
        while isinstance(self.codes["code"], Killed):
            again.append(place)
            started(self, None)

    monkeypatch.setattr(Relayed, "start", restart)
    settings = {"rounds": 4, "seed": 4, **CASES["error feedback"]}
    run, _, _ = relayed(tmp_path, settings)
    assert again == [place]
    assert rows(run) == rows(alone(tmp_path, settings, 4))


def quiet(*args, **options):
    """Join; the server reports an error."""
    with suppress(AtollError):
        join_federation(*args, **options)


def table_run(folder, it, below=(), policy=Policy(), **spec):
    """The run of three sites with their tables, of which some are below a relay. Those are numbered first."""
    one = Served(folder, it, **spec)
    if below:
        at = ServerHome.open(one.home, serve=False)
        made = Relayed(at.invite("ward", one.address, None, 1, relay=2).text(), folder / "ward")
        for name, token in zip(below, made.tokens(*below), strict=True):
            file, home = folder / f"{name}.csv", folder / name
            options = {"once": True, "policy": policy}
            threading.Thread(target=quiet, args=(token, home, str(file)), kwargs=options, daemon=True).start()
        assert eventually(lambda: len(at.database.clients()) == 1 + len(below))
        at.close()
        one.relay = made
    for name in SITES:
        if name not in below:
            one.join(name, folder / f"{name}.csv")
    return one.wait(60)["server"], one


@pytest.mark.slow
def test_sites_below_a_relay_send_statistics_and_evaluations(tmp_path):
    runs = []
    for below in ((), SITES[:2]):
        folder = tmp_path / str(len(below))
        folder.mkdir()
        write_tables(folder)
        it = experiment(**SMALL, rounds=2, clients=3, held_out=0.3, class_weight="balanced")
        run, _ = table_run(folder, it, below, schema=str(bare(folder, "ill")))
        assert not isinstance(run, BaseException), run
        runs.append(run)
    direct, relayed_run = (run.path for run in runs)
    assert (direct / "model.safetensors").read_bytes() == (relayed_run / "model.safetensors").read_bytes()
    assert rows(runs[0]) == rows(runs[1])
    tables = [pandas.read_csv(path / "clients.csv") for path in (direct, relayed_run)]
    assert tables[1].client.tolist() == ["ward/north", "ward/south", "west"]
    assert tables[0].drop(columns="client").equals(tables[1].drop(columns="client"))
    notes = [line for line in (relayed_run / "events.jsonl").read_text().splitlines() if "is trusted" in line]
    assert len(notes) == 1


@pytest.mark.slow
def test_a_refusal_below_a_relay_ends_a_closed_run_by_name(tmp_path):
    write_tables(tmp_path)
    it = experiment(**SMALL, rounds=2, clients=3, held_out=0)
    given = csv(tmp_path / "all.csv", target="ill", by="site").split(held_out=0).described()
    (tmp_path / "input.json").write_bytes(given.encode())
    run, _ = table_run(tmp_path, it, SITES[:1], Policy(max_rounds=1), schema=str(tmp_path / "input.json"))
    with pytest.raises(RunError, match=r"ward/north.*policy-rounds"):
        raise run


@pytest.mark.slow
def test_a_plan_that_is_no_sum_is_refused_with_a_relay(tmp_path):
    settings = {"model": "softmax", "recipe": "fedavg(lr=0.5)", "plan__aggregator": "Median()", "rounds": 1}
    server = Hosted(tmp_path / "server", {**settings, "clients": 1})
    server.wait("run")
    at = ServerHome.open(tmp_path / "server", serve=False)
    token = at.invite("ward", None, None, 1, relay=2).text()
    with pytest.raises(UsageError, match="with --relay"):
        at.invite("ward", None, None, 1)
    at.close()
    made = Relayed(token, tmp_path / "ward")
    with pytest.raises(UsageError, match="home of a relay"):
        ServerHome.open(tmp_path / "ward", serve=False).invite("second", None, None, 1, relay=2)
    made.thread.join(60)
    with pytest.raises(UsageError, match=r"Median\(\) with a relay"):
        raise made.codes["code"]
    client(server.tokens("site")[0], tmp_path / "site", [])
    assert server.run().rounds == 1
    with pytest.raises(UsageError, match="Median") as error:
        serve_run(server.experiment, server.spec)  # the relay is invited before the next run
    assert "Mean()" in str(error.value)


def test_the_reasons_of_lost_clients_fit_into_the_answer_of_a_relay():
    starts = {bytes([i]): wire.Start(i, 0) for i in range(4)}
    plan = Plan(Gradient(), Mean())
    gathering = Gathering(structs.replace(work(), kind="evaluate"), starts, plan, None, dict.fromkeys(range(4), 3))
    for name in starts:
        gathering.lose(name, "failed", "\U0001f41a\0" * 1000)
    body, form = gathering.body(None), SimpleNamespace(longest=0)
    assert gathering._fold is None and gathering._arrived == []  # the sums end with their bytes
    asked = RelayWork(wire.RELAYS, gathering.work, tuple(starts.values()), None, None, form)
    assert len(asked.read(body, {}, plan).head.lost) == 4 and len(body) <= asked.assigned().most


def test_a_relay_gives_a_sampler_with_unequal_chances_no_wrong_weights(tmp_path, monkeypatch):
    """The rows of the clients, and so the chances, are known only after `begin` and the reports of the relays."""
    engine = ServerEngine(Server(str(tmp_path), clients=2), RunOptions())
    monkeypatch.setattr(engine, "_check", lambda plan: None)
    plan = Plan(Gradient(), Mean(), cohort=Weighted(1))
    engine._check_relays(plan)
    engine._relays.of_leaf[0] = wire.RELAYS
    engine._rows, engine._new_rows = {0: 3, 1: 1}, True
    engine._populate()
    with pytest.raises(UsageError, match=r"Weighted\(1\) with a relay"):
        engine.check_start(plan, None)
    engine.close()


@pytest.mark.slow
def test_a_run_with_unequal_chances_and_a_relay_is_refused_once_the_rows_are_known(tmp_path):
    settings = {"model": "softmax", "recipe": "fedavg(lr=0.5)", "plan__cohort": "Weighted(1)", "rounds": 1}
    with pytest.raises(UsageError, match=r"Weighted\(n=1\) with a relay|Weighted\(1\) with a relay"):
        relayed(tmp_path, {**settings, "split": "Dirichlet(0.3)"}, 1, 2)


@pytest.mark.slow
def test_a_further_token_begins_a_new_chain_of_a_relay_that_has_settled_its_sums(tmp_path):
    settings = {"rounds": 2, "seed": 4, **CASES["error feedback"]}
    relayed(tmp_path, settings, 1, 1)
    at = ServerHome.open(tmp_path / "server", serve=False)
    again = at.invite("relay-0", None, None, 1, relay=2).text()
    at.close()
    home, root = ServerHome.open(tmp_path / "relay-0"), tmp_path / "relay-0" / "root"
    relay = Relay(home, root, Server(str(tmp_path / "relay-0")), {}, lambda facts: None)
    assert relay.chain.settled is not None
    one = Prepared(bytes(16), None, b"sum", {})
    with pytest.raises(UsageError, match="1 sums that are not settled"):
        run_loop(_member(again, root, lambda facts: None, None, [one]))
    relay.close()


@pytest.mark.slow
def test_kills_of_a_relay_and_of_its_root_change_no_bit(tmp_path):
    settings = {"model": "softmax", "recipe": "fedavg(lr=0.5, batch=50)", "rounds": 8, "seed": 4, "numerics": "fused"}
    settings |= {"plan__codec": CASES["error feedback"]["plan__codec"]}
    flags = ["--data", "digits", "--clients", "2", "--rounds", "8", "--seed", "4"]
    for name in ("model", "recipe", "numerics"):
        flags += [f"--{name}", settings[name]]
    flags += ["--set", f"plan.codec={settings['plan__codec']}", "--set", "report=false"]
    with Federation(tmp_path, *flags) as it:
        address = it.serve()
        token = json.loads(it.run("invite", "ward", "--relay", 2, "--home", it.home, "--json"))["token"]
        words = ["relay", "--home", tmp_path / "ward", "--once", "--json"]
        ward = it.start(words[0], token, *words[1:], failpoint="relay.prepared:3")
        ward.wait_for(lambda line: line["event"] == "listening")
        out = it.run("invite", "site-0", "site-1", "--home", tmp_path / "ward", "--json")
        it.tokens = [json.loads(line)["token"] for line in out.splitlines()]
        for k in range(2):
            it.join(k)
        ward.process.wait(120)  # killed after its third partial was written
        ward = it.start(*words)
        it.server.after_round(4)
        it.server.kill()
        ward.kill()
        ward = it.start(*words)
        assert it.serve() == address
        codes = [it.clients[k].code() for k in range(2)], ward.code(), it.server.code()
        assert codes == ([0, 0], 0, 0), ward.stderr()
        reference = alone(tmp_path, settings, 2)
        assert comparable(it.path()) == comparable(reference.path)
        assert (it.path() / "model.safetensors").read_bytes() == (reference.path / "model.safetensors").read_bytes()
        it.run("verify", "--home", it.home)
        it.run("verify", "--home", tmp_path / "ward")


class Wire(Link):
    """A link whose open connections a test can cut."""

    def __init__(self):
        super().__init__([])
        self.made = []

    def finish_request(self, request, address):
        passed = self

        class Kept(Connection):
            def setup(self):
                passed.made.append(self)

        Kept(request, address, self)

    def through(self, address):
        self.target = address
        return ":".join(map(str, self.server_address))

    def cut(self):
        for one in self.made:
            one.fault = Fault("cut")  # with the next byte


@pytest.mark.slow
def test_a_relay_that_connects_again_keeps_its_lease_while_its_clients_train(tmp_path, monkeypatch):
    monkeypatch.setattr("atoll.net.client.PROGRESS_S", 0.1)
    monkeypatch.setattr("atoll.net.relay._WAIT_S", 0.05)
    begun, ends, signs = threading.Event(), threading.Event(), []
    compute, progress = Site.compute, Coordinator._progress

    def slow(site, work, *args):
        if work.round == 1 and site.client == 0:
            begun.set()
            while not ends.wait(0.05):
                args[2](0, 0, 0.0)  # a step
        return compute(site, work, *args)

    def count(it, c, message):
        signs.append(it.limits.absent_s) if c.id >= wire.RELAYS else None
        return progress(it, c, message)

    monkeypatch.setattr(Site, "compute", slow)
    monkeypatch.setattr(Coordinator, "_progress", count)
    settings, results = {"rounds": 3, "seed": 4, **CASES["error feedback"]}, []
    with Wire() as it:
        options = {"through": it.through, "absent_s": 0.5, "lease_s": 1.0}
        run = threading.Thread(target=lambda: results.append(relayed(tmp_path, settings, 1, 2, **options)))
        run.start()
        assert begun.wait(60)
        it.cut()
        assert eventually(lambda: len(it.made) > 3 and it.happened)
        first = len(signs)
        kept = eventually(lambda: len(signs) >= first + 30, 15)  # twice the time after which it would be absent
        ends.set()
        run.join(60)
    assert kept and rows(results[0][0]) == rows(alone(tmp_path, settings, 2))


class Gone(BaseException):
    """The end of a client for good."""


@pytest.mark.slow
def test_a_client_that_is_gone_for_good_is_absent_below_a_relay_as_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("atoll.net.client.PROGRESS_S", 0.1)
    monkeypatch.setattr("atoll.net.relay._WAIT_S", 0.05)
    compute = Site.compute

    def end(site, work, *args):
        if work.round >= 1 and site.client == 1:
            raise Gone
        return compute(site, work, *args)

    monkeypatch.setattr(Site, "compute", end)
    settings, spec = {"rounds": 4, "seed": 4, **CASES["error feedback"]}, {"absent_s": 0.2, "lease_s": 0.5}
    below, _, _ = relayed(tmp_path / "below", settings, 1, 3, gone=(1,), **spec)
    server = Hosted(tmp_path / "flat", {**settings, "clients": 3}, **spec)
    for k, token in enumerate(server.tokens("site-0", "site-1", "site-2")):
        client(token, tmp_path / f"flat-{k}", [])
    flat = server.run()
    assert rows(below) == rows(flat) and [row[2] for row in rows(below)] == [3, 2, 2, 2]
    assert (below.path / "model.safetensors").read_bytes() == (flat.path / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_client_without_a_place_waits_with_one_line_and_the_run_goes_on(tmp_path):
    settings = {"rounds": 3, "seed": 4, **CASES["error feedback"]}
    run, (relay,), seen = relayed(tmp_path, settings, 1, 2, spare=1)
    assert rows(run) == rows(alone(tmp_path, settings, 2))
    kinds = [event["event"] for event in seen[2]]
    assert kinds.count("waiting") == 1 and kinds.count("connected") == 1, seen[2]
    (waits,) = (event for event in seen[2] if event["event"] == "waiting")
    assert waits["code"] == "places" and "2 clients" in waits["reason"]
    refused = [event for event in relay.events if event["event"] == "refused"]
    assert [event["code"] for event in refused] == ["places"]


def root_engine(folder, monkeypatch, clients, leaves, **spec):
    """The engine of a root with one relay, and the answers that it sends."""
    at = ServerHome.open(folder)
    at.database.put("address", "127.0.0.1:1")
    at.invite("ward", None, None, 1, relay=leaves)
    at.close()
    engine = ServerEngine(Server(str(folder), clients=clients, **spec), RunOptions())
    sent, plan = [], Plan(Gradient(), Mean())
    monkeypatch.setattr(engine, "_check_relays", lambda plan: None)
    engine._begun, engine._hashes = plan, (bytes(32), bytes(32))
    limits = Limits(absent_s=spec.get("absent_s"), max_rows=engine.spec.max_rows)
    engine._net = SimpleNamespace(handle=sent.append, coordinator=SimpleNamespace(limits=limits), stop=lambda: True)
    events = []
    engine.notify = lambda facts: events.append((facts["event"], facts.get("code", facts.get("client"))))
    return engine, sent, events


def test_a_client_with_too_many_rows_costs_its_relay_only_this_client(tmp_path, monkeypatch):
    engine, sent, events = root_engine(tmp_path, monkeypatch, 4, 3, max_rows=20)
    leaves = wire.Leaf("north", 20, 5), wire.Leaf("south", 21, 0), wire.Leaf("east", 4, 21)
    engine._reported(wire.RELAYS, leaves)
    engine._reported(wire.RELAYS, leaves)
    (numbers,) = {one.numbers for one in sent}
    assert [(place.client, place.code) for place in numbers.places] == [(0, ""), (1, "rows"), (2, "rows")]
    assert engine._rows == {0: 20} and numbers.rules.max_rows == 20
    assert events == [("present", 0), ("refused", "rows")]  # one line for both, and none for the same report again
    engine._reported(wire.RELAYS, (wire.Leaf("north", 19, 0),))  # other rows than before
    assert sent[-1].numbers.places == (wire.Place("north", 0, "rows"),) and engine._rows == {0: 20}
    engine.close()


def test_a_relay_has_no_more_clients_than_its_invitation_states(tmp_path, monkeypatch):
    engine, sent, events = root_engine(tmp_path, monkeypatch, 8, 2, absent_s=5.0)
    hostile = tuple(wire.Leaf(f"site-{i}", 1, 0) for i in range(8))
    engine._reported(wire.RELAYS, hostile)
    places = sent[-1].numbers.places
    assert [place.code for place in places] == ["", "", *["places"] * 6] and engine._rows == {0: 1, 1: 1}
    assert events.count(("refused", "places")) == 1
    for i in range(40):
        engine._reported(wire.RELAYS, tuple(wire.Leaf(f"x-{i}-{k}", 1, 0) for k in range(9)))  # it names others
    assert sum(map(len, engine._relays.refused.values())) == 9
    assert all(place.code for place in sent[-1].numbers.places)
    engine.home.invite("ward", None, None, 1, relay=3)
    engine._reported(wire.RELAYS, hostile)
    assert [place.client for place in sent[-1].numbers.places[:4]] == [0, 1, 2, wire.RELAYS]
    for number in (0, wire.MAX_LEAVES + 1):
        with pytest.raises(UsageError, match=f"--relay {number}"):
            engine.home.invite("annex", None, None, 1, relay=number)
    engine.close()


def test_a_sum_that_is_never_committed_keeps_no_sums_in_memory_and_ends_with_the_next_round(tmp_path):
    home = ServerHome.open(tmp_path)
    relay = Relay(home, tmp_path, Server(str(tmp_path)), {}, lambda facts: None)
    handled, plan = [], Plan(Gradient(), Mean())
    relay.net.handle = lambda *given: handled.extend(given)
    relay.chain.begin("run")
    relay._opened = "run", True
    for round in (3, 4):
        order = structs.replace(work(), work=bytes([round] * 16), round=round, version=round)
        gathering = Gathering(order, {bytes([round]): wire.Start(0, 0)}, plan, None, {0: 3})
        gathering.lose(bytes([round]), "absent", "")
        gathering.accepted.append(Accepted(0, round, 0, bytes([round]), None, bytes(32), 3))
        relay._end_earlier(order)
        relay._gatherings[order.work] = gathering
        relay._prepared(order, gathering, b"sum")
        assert [one.work for one in relay.chain.prepared] == [order.work] == [*relay._gatherings]
    assert [event.works for event in handled] == [(bytes([3]),)] and handled[0].undone
    relay._end_earlier(structs.replace(order, kind="evaluate", round=9))
    relay.chain.on_settled = lambda one: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        relay.chain.settle((order.work,))
    relay._end_earlier(structs.replace(order, round=9))  # the root has committed it, and settles it again
    assert len(relay.chain.prepared) == 1
    relay.close()


def test_a_client_that_its_relay_does_not_know_costs_only_itself(tmp_path):
    home = ServerHome.open(tmp_path)
    home.database.put("address", "127.0.0.1:1")
    home.database.put("relay", "1")
    home.invite("north", None, None, 1)
    home.database.renumber({"north": 0})
    home.database.record_rows(0, 3, 0, bytes(32))
    relay = Relay(home, tmp_path, Server(str(tmp_path)), {}, lambda facts: None)
    handled, form = [], SimpleNamespace(shortest=0, longest=9)
    relay.net.handle = lambda *given: handled.extend(given)
    starts = wire.Start(0, 0), wire.Start(1, 0)
    gathering = relay._begin(work(), b"model", None, starts, Plan(Gradient(), Mean()), form)
    assert [event.client for event in handled] == [0] == [gathering.starts[name].client for name in gathering.open]
    assert [(one.client, one.code) for one in gathering._lost] == [(1, "rows")]
    relay.close()


def test_a_refusal_ends_a_client_although_its_channel_ends_before_its_thread_is_free(tmp_path, monkeypatch):
    settings = {"model": "softmax", "recipe": "fedavg(lr=0.5)", "plan__aggregator": "Median()", "rounds": 1}
    server = Hosted(tmp_path / "server", {**settings, "clients": 1})
    server.wait("run")
    enter, ended = Relay.enter, threading.Event()

    def slow(relay, *args):
        enter(relay, *args)
        ended.wait(0.5)  # the root has closed the channel

    monkeypatch.setattr(Relay, "enter", slow)
    at = ServerHome.open(tmp_path / "server", serve=False)
    made = Relayed(at.invite("ward", None, None, 1, relay=1).text(), tmp_path / "ward")
    at.close()
    made.thread.join(60)
    assert isinstance(made.codes["code"], UsageError)
    assert [event["event"] for event in made.events].count("connected") == 1, made.events
    client(server.tokens("site")[0], tmp_path / "site", [])
    assert server.run().rounds == 1
