"""Record ε of 200 settings by dp-accounting: `python tests/golden/dp_accounting_answers.py`.

The package requires attrs < 24, so it needs an environment of its own. `test_accountant.py` reads the file.
"""

import json
import random
from pathlib import Path

from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp import RdpAccountant

ORDERS = range(2, 257)
FILE = Path(__file__).with_name("dp_accounting.json")


def settings(count):
    """Settings (q, z, T, δ): each number has a logarithmic range, and ε stays below 50."""
    draw = random.Random(17)
    found = [(1.0, 4.0, 10, 1e-5), (1e-4, 0.5, 2000, 1e-9)]
    while len(found) < count:
        q, z = round(10 ** draw.uniform(-4, 0), 6), round(10 ** draw.uniform(-0.3, 1), 4)
        rounds, delta = round(10 ** draw.uniform(0, 3.3)), float(f"{10 ** draw.uniform(-9, -4):.2e}")
        if rdp(q, z, rounds, delta) < 50:
            found.append((q, z, rounds, delta))
    return found


def event(q, z, rounds):
    once = dp_event.GaussianDpEvent(z)
    return dp_event.SelfComposedDpEvent(once if q == 1 else dp_event.PoissonSampledDpEvent(q, once), rounds)


def rdp(q, z, rounds, delta):
    return RdpAccountant(ORDERS).compose(event(q, z, rounds)).get_epsilon(delta)


def pld(q, z, rounds, delta):
    return PLDAccountant().compose(event(q, z, rounds)).get_epsilon(delta)


if __name__ == "__main__":
    # The PLD of dp-accounting takes seconds, so every sixth setting has one.
    rows = [[*one, rdp(*one), pld(*one) if n % 6 == 0 else None] for n, one in enumerate(settings(200))]
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
