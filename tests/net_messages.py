"""Examples of every message of the network, which the tests of frames share."""

from atoll.net import wire

WORK, OTHER = bytes(range(16)), bytes(range(16, 32))
LEASE = wire.Lease(1_800_000_000, 12)
HASH = bytes(range(32))
BLOB = wire.Blob(HASH, 70_000)
RULES = wire.RelayRules(60.0, 600.0, 86_400.0, 1 << 24, 4, 2)
VERSIONS = wire.Versions("3.11.7", "0.1.0", "2.13.0+cpu", "2.4.6")
PLAN = "Plan(Train(sgd(0.1), epochs=1, batch=10), Mean(), sgd(1.0))"


def work(**changes):
    fields = dict(
        work=WORK, kind="round", rows="train", round=3, version=3, repeat=0, plan=PLAN,
        key=wire.WireKey("-7", (1, 1 << 63)), numerics="fused", layout=HASH, input=HASH, model=b"model", deltas=(),
        rest=None, fixed=None, attempt=0, sum=None, lease=LEASE, deadline=None,
    )  # fmt: skip
    return wire.Work(**{**fields, **changes})


UP = {
    "Hello": wire.Hello(wire.PROTOCOL, VERSIONS, "AMD EPYC", ("fused", "loop"), "2026-11-30-calm-bay", WORK, (OTHER,)),
    "Hello new": wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), None, None, ()),
    "Ready": wire.Ready(HASH, 1 << 24, 100),
    "Update": wire.Update(WORK, LEASE, OTHER, b"body"),
    "Update first": wire.Update(WORK, LEASE, None, b""),
    "Sent": wire.Sent(WORK, LEASE, OTHER, 65_537, HASH),
    "Progress": wire.Progress(WORK, 300),
    "Refusal": wire.Refusal(WORK, "policy-rounds", "The policy allows 10 rounds."),
    "Refusal session": wire.Refusal(WORK, "session", "few_survivors: 3 survivors."),
    "Refusal run": wire.Refusal(None, "input", "Column age\nis missing; größer"),
    "Leave": wire.Leave("stopped"),
    "Members": wire.Members(HASH, (wire.Leaf("ward-1", None, 0), wire.Leaf("ward-2", 300, 75))),
}
DOWN = {
    "Welcome": wire.Welcome(4, 1_800_000_000, "2026-11-30-calm-bay", "hospitals", BLOB, None),
    "Welcome seat": wire.Welcome(4, 7, None, "hospitals", None, wire.Seat("Dirichlet(0.3)", "0", 10)),
    "Work": work(),
    "Work large": work(
        model=BLOB, deltas=(BLOB, b"delta"), rest=b"rest", fixed=BLOB, deadline=2.5, kind="evaluate", rows="held"
    ),
    "Work masked": work(attempt=1, sum=wire.SumTerms(30, 600, 6000)),
    "Receipt": wire.Receipt(WORK, "received"),
    "Settled": wire.Settled((WORK, OTHER)),
    "Cancel": wire.Cancel(WORK),
    "Bye": wire.Bye("done", "Finished 10 rounds.", None, BLOB),
    "Numbers": wire.Numbers((wire.Place("ward-1", 4, ""), wire.Place("ward-2", wire.RELAYS, "places")), 1, RULES),
    "Gather": wire.Gather(work(), (wire.Start(4, 0), wire.Start(5, 1))),
    "Bye later": wire.Bye("draining", "", 5.0, None),
}
STEP = wire.StepMessage(WORK, 2, 100, b"shares")
STEP_CAP = 1024
