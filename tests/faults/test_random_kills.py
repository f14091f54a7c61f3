"""Many kills at random moments, of the server and of clients, change no bit and count every contribution once."""

import json
import os
import random
import time

import pytest
from faults.test_rehearsal import SMALL, flags, reference, same_bits
from network import TICK, Federation, comparable, rows_of

from atoll.net.home import ServerHome

KILLS = int(os.environ.get("ATOLL_KILLS", "10"))  # of the server, and of clients
PLANS = {
    "error feedback": {"recipe": "fedavg(lr=0.5, batch=50)", "plan__codec": "ErrorFeedback(TopK(0.05))"},
    "control variates": {"recipe": "scaffold(lr=0.5, batch=50)", "plan__codec": "Identity()"},
    "a part of the user": {
        "plan__local": "variates:Variates(0.5, steps=3, batch=50)",
        "plan__aggregator": "Mean(weights='equal')",
        "plan__codec": "Identity()",
    },
}


@pytest.mark.slow
@pytest.mark.timeout(max(1800, 180 * KILLS))
@pytest.mark.parametrize("plan", PLANS)
def test_random_kills_change_no_bit(tmp_path, plan):
    rng = random.Random(f"kills of {plan}")
    targets = ["server"] * KILLS + ["client"] * KILLS
    rng.shuffle(targets)
    rounds = 20 * len(targets) + 2  # some rounds pass in the time before a kill: the run must not end before the last
    settings = {**SMALL, **PLANS[plan], "clients": 3, "rounds": rounds}
    returned, users = [], plan == "a part of the user"
    own, again = (("--part", "Variates=variates:Variates"), ("--trust",)) if users else ((), ())
    with Federation(tmp_path, *flags(**settings), clients=3) as it:
        address = it.serve()
        it.invite()
        for client in range(3):
            it.join(client, *own)
        for number, target in enumerate(targets):
            it.server.after_round(3 * number)
            TICK.wait(rng.uniform(0, 0.1))
            if target == "server":
                it.server.kill()
                assert it.serve(*again) == address
                began = time.monotonic()
                it.server.wait_for(lambda line: line.get("event") == "round")
                returned.append(time.monotonic() - began)
            else:
                client = rng.randrange(3)
                it.clients[client].kill()
                it.join(client, *own, token=False)
        assert [it.server.code(), *(client.code() for client in it.clients.values())] == [0] * 4, it.server.stderr()
        path = it.path()
        rows = rows_of(path)
        assert [(row["round"], row["arrived"]) for row in rows] == [(number, 3) for number in range(rounds)]
        assert json.loads(it.run("verify", "--home", it.home, "--json"))["ok"]
        at = ServerHome.open(it.home, serve=False)
        accepted = [[one.client for one in at.database.accepted(path.name, number)] for number in range(rounds)]
        at.close()
        assert all(sorted(clients) == [0, 1, 2] for clients in accepted)
        alone = reference(tmp_path, **settings)
        assert same_bits(path, alone) and comparable(path) == comparable(alone)
    print(f"{plan}: {KILLS} + {KILLS} kills, seconds from listening to the next round: {sorted(returned)}")
