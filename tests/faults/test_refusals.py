"""Values that are rarely wrong are refused too: each error has the given value, what is required, and a line to write.

tests/conftest.py reads each line at its doors. Here the refused call is made directly, without a training.
"""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import atoll
from atoll.base import grammar
from atoll.base.errors import UsageError
from atoll.base.random import SecretKey
from atoll.cli import main, net_commands, predict
from atoll.compute.discrete_gaussian import discrete_gaussian
from atoll.compute.loss import cross_entropy, loss_of
from atoll.data.input import LARGEST_FILE, Input
from atoll.data.schema import Schema
from atoll.engine.protocols import RunOptions
from atoll.engine.simulation.fleet import Between, ByRows, Fleet, rate
from atoll.engine.spec import engine
from atoll.engine.workers.forkserver import ForkServer
from atoll.net import identity, join, policy, store, systemd
from atoll.net.client import Ended
from atoll.net.identity import Token, check_address
from atoll.net.spec import Server
from atoll.plan.aggregate import Masks, Mean
from atoll.plan.aggregate.attacks import Attacked, Claim, SignFlip
from atoll.plan.aggregate.ring import grid_of, largest_bits
from atoll.plan.codec import EF21, Entropy, ErrorFeedback, Identity, Noise, Quantize, RandomK, TopK
from atoll.plan.codec.stage import Chain, flat_layout
from atoll.plan.local import Custom, Dynamic, Gradient, Scaffold, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.protocols import Declared
from atoll.plan.registry import PARTS
from atoll.plan.sampler import Poisson
from atoll.plan.schedule import constant, plateau
from atoll.secure.params import Topology, least_threshold
from atoll.sklearn import FederatedClassifier
from atoll.tools import export, lr, sweep
from atoll.tools.new.project import new_project
from atoll.track.wandb import WandB
from atoll.training.known_names import check_call
from atoll.training.setting_texts import as_text, checked
from atoll.training.stop import Patience, Target, refuse_unknown
from atoll.training.train import _run_of

X, Y = np.zeros((6, 2), np.float32), np.arange(6) % 2
UINT32 = Declared(1, torch.int64, "sum")
NOW = datetime.now(UTC)
EXPERIMENT = atoll.training.experiment.Experiment()


# The call, the beginning of what was given, and a part of what is required.
CASES = {
    # base and settings
    "no call": (lambda: grammar.arguments("sgd"), "'sgd' is no call", "name(argument"),
    "too deep": (lambda: grammar.parse("hold(" * 40 + ")" * 40, PARTS), "'hold(hold(", "levels"),
    "wrong number of arguments": (
        lambda: grammar.parse("Uniform(1, 2, 3)", PARTS),
        "'Uniform(1, 2, 3)': ",
        "arguments of",
    ),
    "integers": (lambda: SecretKey.of_seed(1).integers(3, 0), "integers(high=0)", "1 to 2^62"),
    "deviation": (
        lambda: discrete_gaussian(SecretKey.of_seed(1), 3, 1e30),
        "A discrete Gaussian of deviation 1e+30",
        "2^54",
    ),
    "call of a name": (lambda: check_call("Dirichlet", ("Dirichlet",), "partition"), "Dirichlet is a name", "a call"),
    "share as a partition": (lambda: check_call("0.5", ("Dirichlet",), "partition"), "'0.5' is no partition", "a call"),
    "setting of an object": (lambda: as_text("metrics", object()), "metrics = <object", "a file can contain"),
    "value of a file": (lambda: checked("rounds", "ten", int, 5, "a.toml"), "a.toml: rounds = 'ten'", "a whole number"),
    "value of the environment": (
        lambda: checked("rounds", "ten", int, 5, "ATOLL_ROUNDS"),
        "ATOLL_ROUNDS: rounds = 'ten'",
        "a whole number",
    ),
    "fleet": (lambda: atoll.Settings(fleet=3), "fleet = 3", "a Fleet"),
    "an object": (lambda: atoll.Settings(class_weight=3), "class_weight = 3", "the weight of each class"),
    "delta": (lambda: atoll.Settings(delta=-1.0), "delta = -1.0", "a number above 0"),
    "a plan": (lambda: atoll.rounds("softmax", atoll.data.arrays(X, Y).split(2), print), "plan is <built-in", "a plan"),
    "more rounds of nothing": (lambda: _run_of(None, None, 3), "more = 3 without resume", "a run to continue"),
    "target of no direction": (lambda: Target("size", 0.9), "Target('size'", "above and below"),
    "patience of no direction": (lambda: Patience("size", 3), "Patience('size'", "better='higher'"),
    "metric of a rule": (lambda: refuse_unknown(Target("accuracy", 0.9), ["loss"]), "Target('accuracy'", "loss"),
    "engine": (lambda: engine(3), "engine = 3", "`build`"),
    # compute and data
    "axis": (lambda: cross_entropy(axis=0), "cross_entropy: axis = 0", "other than 0"),
    "quantile without q": (lambda: loss_of("quantile"), "The loss quantile without q", "between 0 and 1"),
    "uint64": (lambda: atoll.data.arrays(np.full((4, 1), 2**63, np.uint64), Y[:4]), "x", "whole numbers up to"),
    "no client": (lambda: atoll.data.arrays(X, Y).split(0), "split(0)", "an integer ≥ 1"),
    "levels": (lambda: atoll.data.csv("a.csv", max_levels="many"), "max_levels = 'many'", "a number ≥ 1"),
    "option of a table": (lambda: atoll.data.csv("a.csv", decimal=3), "decimal = 3", "a text"),
    "test clients": (
        lambda: atoll.data.arrays(X, Y, by=list("aabbcc"), test=(X, Y, list("abcabd"))),
        "The client 'd' has only test rows",
        "a client with train rows",
    ),
    "long input": (
        lambda: Input.decode(bytes(LARGEST_FILE + 1)),
        f"input.json has {LARGEST_FILE + 1:,} bytes",
        "at most",
    ),
    "schema": (lambda: Schema.read("{}"), "The text is no schema: KeyError", "`Schema.text`"),
    "cox": (
        lambda: atoll.models.build("cox", (3,), 2, "classification", atoll.Key(0)),
        "The model 'cox'",
        "two targets",
    ),
    # simulation
    "rate": (lambda: rate("1.2.3 kB/s"), "A rate of '1.2.3 kB/s'", "a number above 0"),
    "between": (lambda: Between(2.0, high=1.0), "Between(2, high=1)", "low < high"),
    "nothing between": (lambda: Between(2.0, high=2.0), "Between(2, high=2)", "low < high"),
    "rate by rows": (lambda: Fleet(uplink=ByRows(1.0)), "Fleet has uplink = ByRows(", "a distribution of rates"),
    "one server": (lambda: Fleet(server=Between(1.0, high=2.0)), "Fleet has server = Between(", "a rate"),
    "rate of a fleet": (lambda: Fleet(uplink="fast"), "Fleet has uplink = 'fast'", "a number above 0"),
    # parts
    "attack": (lambda: Claim(10, 3), "Claim(10, 3)", "an attack as `of`"),
    "attacked": (lambda: Attacked(3, SignFlip()), "Attacked(3, ", "an aggregator"),
    "attacked twice": (
        lambda: Attacked(Attacked(Mean(), SignFlip()), SignFlip()),
        "Attacked(Attacked(",
        "no second attack",
    ),
    "no attack": (lambda: Attacked(Mean(), Mean()), "Attacked(Mean(), Mean())", "an attack: "),
    "attack of a secure sum": (
        lambda: Attacked(Mean(secure=True), SignFlip()),
        "Attacked(Mean(",
        "without a secure sum",
    ),
    "sum": (lambda: Mean(sum="double"), "Mean(sum='double')", "sum one of 'exact', 'float'"),
    "weights": (lambda: Mean(weights="rows"), "Mean(weights='rows')", "weights one of"),
    "limit": (lambda: Mean(max_weight=0.5), "Mean(max_weight=0.5)", "a whole number"),
    "limit of equal weights": (lambda: Mean("equal", max_weight=3), "Mean('equal'", 'weights="examples"'),
    "limit of a secure sum": (lambda: Mean(secure=True, max_weight=3), "Mean(", "no secure sum"),
    "ring": (lambda: Masks(ring=16), "Masks(ring=16)", "32 or 64"),
    "bits": (
        lambda: largest_bits(Masks(bits=30), 100, 10, torch.float32),
        "100 clients of weight 10 with 30 bits",
        "at most",
    ),
    "no bit": (
        lambda: largest_bits(Masks(), 2**20, 2**12, torch.float32),
        "1048576 clients of weight 4096",
        "a larger ring",
    ),
    "counts": (
        lambda: grid_of(Masks(), UINT32, 2**20, 1, 2.0**20),
        "1048576 clients with counts up to",
        "a larger ring",
    ),
    "codec of feedback": (lambda: ErrorFeedback(3), "ErrorFeedback(3)", "a codec"),
    "no contraction": (lambda: ErrorFeedback(RandomK(0.5)), "ErrorFeedback(RandomK(", "less than its input"),
    "two memories": (lambda: EF21(ErrorFeedback(TopK(0.1))), "EF21(ErrorFeedback(", "a codec without a memory"),
    "norm": (lambda: Quantize(8, norm="l1"), "Quantize(8, norm='l1'", "'max', 'l2'"),
    "bucket": (lambda: Quantize(8, bucket=9), "Quantize(8, bucket=9)", "a power of two"),
    "stage": (lambda: Chain((Identity(), 3)), "3 in a codec", "a stage"),
    "order of stages": (lambda: Entropy() >> TopK(0.1), "Entropy() >> TopK(0.1)", "at the end of a codec"),
    "unbounded": (lambda: Noise(1.0).bind(flat_layout(3)), "Noise(1.0) without a clip", "a bound on the norm"),
    "sends": (lambda: Train(sgd(0.1), steps=1, sends="all"), "Train(sends='all')", "'update' or 'model'"),
    "batch": (lambda: Gradient(batch=0), "Gradient: batch = 0", "at least 1"),
    "chain of corrections": (
        lambda: Scaffold() >> Dynamic(0.1),
        "Scaffold() >> Dynamic(0.1)",
        "Proximal(mu) >> Normalised()",
    ),
    "rate of a loop": (lambda: Custom(print, lr="fast"), "Custom(lr='fast')", "a number, or None"),
    "steps that observe": (
        lambda: Train(sgd(0.1), steps=plateau(3, patience=1)),
        "Train(steps=plateau(",
        "does not observe",
    ),
    "no step": (lambda: Train(sgd(0.1), steps=constant(0.5)), "Train(steps=constant(0.5))", "at least 1 step"),
    "optimizer": (lambda: Train("sgd", steps=1), "Train(optimizer='sgd')", "an optimizer"),
    "nesterov": (lambda: sgd(0.1, nesterov=True), "sgd(0.1, nesterov=True)", "momentum > 0"),
    "dampening": (lambda: sgd(0.1, dampening=0.5), "sgd(0.1, dampening=0.5)", "momentum > 0 with dampening"),
    "pace": (lambda: Buffered(0), "Buffered(k=0)", "at least 1"),
    "staleness": (lambda: Bounded(-1), "Bounded(staleness=-1)", "at least 0"),
    "quorum": (lambda: Sync(deadline_s=1, quorum=2.0), "Sync(quorum=2.0)", "in [0, 1]"),
    "chance": (lambda: Poisson(1.5), "Poisson(1.5)", "(0, 1]"),
    "schedule without an end": (
        lambda: constant(0.1) >> constant(0.2),
        "constant(0.1) >> constant(0.2)",
        "a warm-up or a hold",
    ),
    "schedule and a number": (lambda: constant(0.1) >> 3, "constant(0.1) >> 3", "a warm-up or a hold"),
    # net and secure
    "fleet of a server": (lambda: Server("h").check(RunOptions(fleet=Fleet())), "fleet = Fleet()", "no fleet"),
    "clients of a server": (lambda: Server("h", clients=0), "net.clients = 0", "at least 1"),
    "window": (lambda: Server("h", window=5), "net.window = 5", "at least 65536"),
    "lease": (lambda: Server("h", lease_s=0), "net.lease_s = 0", "more than 0 seconds"),
    "address": (lambda: check_address("server"), "The address is 'server'", "HOST:PORT"),
    "wildcard": (lambda: check_address("0.0.0.0:4433"), "The address is '0.0.0.0:4433'", "sites can dial"),
    "host": (lambda: identity._host("a" * 70), "The host name is 'aaa", "a host name"),
    "token": (lambda: Token.read("north"), "The token does not begin with atoll1.", "`atoll invite NAME`"),
    "expired": (lambda: identity.check_dates(dated(-2, -1), NOW), "The certificate expired at", "valid now"),
    "not yet valid": (lambda: identity.check_dates(dated(1, 2), NOW), "The certificate is valid from", "a clock"),
    "ended": (
        lambda: join._exit_code(Ended("revoked", "Bye."), SimpleNamespace(name="north")),
        "The server refuses this client: revoked",
        "",
    ),
    "command of a service": (lambda: systemd.unit("run", []), "atoll service run", "serve or join"),
    "home of a service": (
        lambda: systemd.unit("join", ["--home", "/tmp/x"]),
        "The home '/tmp/x' of a service",
        "a folder below",
    ),
    "token of a service": (
        lambda: systemd.unit("join", ["atoll1.x", "--home", "/var/lib/a"]),
        "A token in the unit",
        "a home that is enrolled",
    ),
    "word of a service": (
        lambda: systemd.unit("join", ["--home", "/var/lib/a", "a\nb"]),
        "The word 'a\\nb'",
        "without line ends",
    ),
    "net setting": (lambda: net_commands._net_settings({"net.leas_s": "3"}), "--set net.leas_s=3", "one of net."),
    "number of a net setting": (
        lambda: net_commands._net_settings({"net.lease_s": "soon"}),
        "--set net.lease_s=soon",
        "a number",
    ),
    "own code of a site": (lambda: net_commands._mapped("--part", ["net"]), "--part net", "NAME=module:function"),
    "few neighbours": (lambda: least_threshold(Topology(2000, 4, 3)), "4 neighbours among 2000 clients", "at least"),
    "odd neighbours": (
        lambda: least_threshold(Topology(2000, 5, 3)),
        "5 neighbours among 2000 clients",
        "an even number",
    ),
    "small graph": (lambda: least_threshold(Topology(8, 4, 3)), "4 neighbours among 8 clients", "the complete graph"),
    # tools
    "space": (lambda: sweep.read_space({"lr": "0.1"}), "lr = 0.1", "a list [a, b]"),
    "value twice": (lambda: sweep.read_space({"lr": "[1, 1]"}), "lr = [1, 1]", "each once"),
    "range of words": (lambda: sweep.read_space({"lr": "log(a, b)"}), "lr = log(a, b)", "two numbers"),
    "whole range": (lambda: sweep.read_space({"batch": "int(1.5, 8)"}), "batch = int(1.5, 8)", "two whole numbers"),
    "range of 0": (lambda: sweep.read_space({"lr": "log(0, 1)"}), "lr = log(0, 1)", "two numbers > 0"),
    "range backwards": (lambda: sweep.read_space({"lr": "linear(2, 1)"}), "lr = linear(2, 1)", "the first smaller"),
    "seed of a sweep": (lambda: sweep.read_space({"seed": "[1, 2]"}), "--over seed", "another setting"),
    "trials": (lambda: sweep._check_counts(trials=(0, 1)), "trials = 0", "an integer, at least 1"),
    "target without a file": (lambda: new_project("new", target="ill"), "The target 'ill' without a file", "a file"),
    "rate of a gradient": (
        lambda: lr.rate_of(atoll.recipes.gd(0.1), "local"),
        "Gradient() has no learning rate",
        "a local part",
    ),
    "mode": (lambda: WandB(mode="live"), "mode = 'live'", "offline"),
    "scale of an estimator": (lambda: FederatedClassifier(scale="client").fit(X, Y), 'scale = "client"', '"none"'),
    "class of an estimator": (
        lambda: FederatedClassifier(class_weight={7: 2.0}, rounds=1).fit(X, Y),
        "class_weight has the class 7",
        "one of 0, 1",
    ),
}


def dated(begin, end):
    return SimpleNamespace(not_valid_before_utc=NOW + timedelta(begin), not_valid_after_utc=NOW + timedelta(end))


def written(folder, name, data=b"", mode=0o600):
    path = folder / name
    path.write_bytes(data)
    path.chmod(mode)
    return path


def of_a_sheet(folder):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("openpyxl")
    pandas.DataFrame({"a": [1.0]}).to_excel(folder / "a.xlsx", sheet_name="rows", index=False)
    atoll.data.csv(folder / "a.xlsx", target="a", sheet="row")


def of_another_format(folder):
    save_file({"w": torch.zeros(2)}, folder / "w.safetensors")
    export.load_exported(folder / "w.safetensors")


def of_a_home_in_use(folder):
    with store.claim_home(folder):
        store.claim_home(folder)


def of_a_closed_server(_):
    server = ForkServer()
    server.close()
    server.start()


ARRAYS = SimpleNamespace(columns=(), features=(2,))
# The same with a folder for files.
IN_A_FOLDER = {
    "sheet": (of_a_sheet, "has no sheet 'row'", "one of rows"),
    "cells": (
        lambda f: list(atoll.data.files.stream_table(written(f, "a.csv", b"a,b\n1,2\n3\n")).batches),
        "Line 3 of",
        "2 cells",
    ),
    "mode of a key": (lambda f: identity.read_key(written(f, "a.key", mode=0o644)), "has mode 0644", "mode 0600"),
    "key": (lambda f: identity.read_key(written(f, "a.key")), "contains no ECDSA key", "a key in PEM form"),
    "identity": (lambda f: identity.own_identity(written(f, "a.key")), "contains no Ed25519 key", "a key in PEM form"),
    "no plan": (policy.approve_plan, "No plan waits at", "ask = true"),
    "home in use": (of_a_home_in_use, "Another process uses the home", "one process"),
    "format": (of_another_format, "has the format 'plain safetensors'", "which `atoll export` writes"),
    "shape of rows": (
        lambda f: predict._open(written(f, "a.csv"), ARRAYS),
        "The model takes arrays of shape (2,)",
        "x.npy",
    ),
    "folder of arrays": (lambda f: predict._open(f, ARRAYS), "has no x.npy", "x.npy"),
    "no file": (lambda f: predict._open(f / "a.csv", ARRAYS), "There is no file", "a CSV"),
    "long file": (lambda f: Input.read(written(f, "a.json", bytes(LARGEST_FILE + 1))), "bytes", "at most"),
    "closed server": (of_a_closed_server, "The fork server was closed", "an open one"),
}
COMMANDS = {
    "levels of an attack": (["attack", "--shares", "some"], "--shares some.", "numbers with commas"),
    "space of a sweep": (["sweep", "--over", "lr"], "--over lr.", "KEY=VALUES"),
    "command": (["swepe"], "No command is called 'swepe'.", "atoll sweep"),
    "flag": (["run", "--zzz", "3"], "No flag is called --zzz.", ""),
    "value": (["run", "--rounds", "ten"], "ten", "Write: atoll run --help"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name):
    call, given, required = CASES[name]
    with pytest.raises(UsageError) as caught:
        call()
    assert caught.value.given.startswith(given) and required in caught.value.required, caught.value


@pytest.mark.parametrize("name", IN_A_FOLDER)
def test_it_is_refused_with_a_file(name, tmp_path):
    call, given, required = IN_A_FOLDER[name]
    with pytest.raises(UsageError) as caught:
        call(tmp_path)
    assert given in caught.value.given and required in caught.value.required, caught.value


@pytest.mark.parametrize("name", COMMANDS)
def test_it_is_refused_at_the_command_line(name, capsys):
    words, given, required = COMMANDS[name]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert given in printed and required in printed
