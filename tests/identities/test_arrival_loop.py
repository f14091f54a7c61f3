"""The loop of real arrivals closes rounds as the virtual clock does, and waits for absent clients."""

from dataclasses import replace

import torch
from problems import classification

import atoll
from atoll import recipes
from atoll.engine.arrival_loop import ArrivalLoop, Landed
from atoll.engine.simulation.arrivals import simulate_round
from atoll.plan.pace import Buffered, Sync
from atoll.plan.round import open_round

DATA = classification((20,) * 6)


def opened(pace, cohort=None):
    plan = replace(recipes.fedavg(0.1), cohort=cohort, pace=pace)
    training = atoll.rounds("softmax", DATA, plan, evaluate_every=0)
    state = open_round(training.plan, training.state, training.engine)
    return training, state


def loop(training, state, receive, away=None):
    sent = []
    ticks = iter(range(1000))
    made = ArrivalLoop(
        training.plan,
        state.state,
        training.engine.population,
        state.cohort,
        sent.append,
        lambda left: receive(sent, left),
        lambda: next(ticks),
        away,
    )
    return made, sent


def in_order(sent, left):
    in_order.done = getattr(in_order, "done", -1) + 1
    return [Landed(sent[in_order.done].number)]


def test_a_synchronous_round_equals_the_simulated_one():
    training, state = opened(Sync())
    in_order.done = -1
    flown = loop(training, state, in_order)[0].run()
    expected = simulate_round(training.plan, state.state, training.engine.population, state.cohort, None, 0)
    assert sorted(flown.arrived) == sorted(expected.arrived)
    assert flown._replace(arrived=[]) == expected._replace(arrived=[])


def test_a_buffered_round_equals_the_simulated_one():
    training, state = opened(Buffered(2), cohort=3)
    in_order.done = -1
    flown = loop(training, state, in_order)[0].run()
    expected = simulate_round(training.plan, state.state, training.engine.population, state.cohort, None, 0)
    assert flown.arrived == expected.arrived and flown.air._replace(clock=None) == expected.air._replace(clock=None)


def test_a_lost_client_has_the_stage_and_the_cause_of_its_loss():
    training, state = opened(Sync())
    ends = [[Landed(0, "policy", "refused")], [Landed(n) for n in range(1, 6)]]
    flown = loop(training, state, lambda sent, left: ends.pop(0))[0].run()
    assert [(d.flight.client, d.stage, d.cause) for d in flown.dropped] == [(0, "policy", "refused")]
    assert len(flown.arrived) == 5


def test_a_round_without_a_client_that_can_start_waits():
    training, state = opened(Sync(), cohort=2)
    present, waited = set(), []

    def receive(sent, left):
        if not present:
            waited.append(left)
            present.update(range(6))
            return []
        return [Landed(flight.number) for flight in sent]

    flown = loop(training, state, receive, away=lambda client: client not in present)[0].run()
    assert waited == [None] and len(flown.arrived) == 2 and not flown.dropped


def test_a_flight_of_an_earlier_round_is_sent_again():
    training, state = opened(Buffered(1), cohort=3)
    in_order.done = -1
    first, sent = loop(training, state, in_order)
    flown = first.run()
    still = {flight.number for flight in flown.air.flights}
    again, resent = loop(training, state._replace(state=_with(state.state, flown.air)), in_order)
    in_order.done = -1
    again.run()
    assert {flight.number for flight in resent[: len(still)]} == still and len(sent) == 3 + len(flown.arrived) - 1


def _with(state, air):
    return replace(state, round=1, air=air, versions={0: state.broadcast})


def test_ids_of_the_cohort_are_the_flights():
    training, state = opened(Sync())
    in_order.done = -1
    made, sent = loop(training, state, in_order)
    made.run()
    assert torch.equal(torch.tensor([f.client for f in sent]), state.cohort.ids)
