"""Random fleets of every kind, for hypothesis."""

import torch
from hypothesis import strategies as st

from atoll.engine.simulation.fleet import Between, ByRows, Chance, Each, Exponential, Fleet, HalfNormal, LogNormal, Zipf

POSITIVE = st.floats(1e-3, 1e3)
PER = st.sampled_from(["client", "flight"])
LAWS = st.one_of(
    st.builds(HalfNormal, POSITIVE, per=PER),
    st.builds(LogNormal, POSITIVE, st.floats(0, 2), per=PER),
    st.builds(Exponential, POSITIVE, per=PER),
    st.builds(Zipf, st.floats(1.5, 4), POSITIVE, per=PER),
    st.builds(lambda low, more, per: Between(low, low + more, per=per), POSITIVE, POSITIVE, PER),
    st.builds(Each, st.lists(POSITIVE, min_size=5, max_size=5).map(tuple)),
)
TIMES = st.one_of(POSITIVE, LAWS, st.builds(ByRows, st.one_of(POSITIVE, LAWS)))
LINKS = st.one_of(st.none(), st.sampled_from(["1 kb/s", "0.3 MB/s"]), POSITIVE, LAWS)
FLEETS = st.builds(
    Fleet,
    compute=TIMES,
    uplink=LINKS,
    downlink=LINKS,
    server=st.one_of(st.none(), st.just("2 kB/s"), POSITIVE),
    availability=st.one_of(st.floats(0.1, 1), st.builds(Chance, st.floats(0.1, 1), POSITIVE)),
    dropout=st.sampled_from([0.0, 0.3]),
    latency=st.one_of(st.just(0.0), TIMES),
)
SIZES = torch.tensor([1, 2, 3, 4, 10])  # the rows of the clients for which FLEETS are built
