"""Tuning ends at the fastest setting of a machine with one optimum, also with noise in the measured times."""

from hypothesis import given
from hypothesis import strategies as st

from atoll.engine.autotune import Trial, Tuning

CHUNKS = [2.0**k for k in range(-3, 4)]


def climbed(seconds, rounds=120):
    climb = Tuning()
    for t in range(rounds):
        setting = climb.setting(Trial(1.0, 1), (1, 2))
        climb.record(1000, seconds(setting, t))
    return climb


@given(st.sampled_from(CHUNKS), st.sampled_from([1, 2]), st.lists(st.floats(0, 9), min_size=7, max_size=7))
def test_it_ends_at_the_peak(peak, threads, noise):
    """Noise only slows rounds down, and one round in three has no noise."""

    def seconds(setting, t):
        away = abs(CHUNKS.index(setting.chunk) - CHUNKS.index(peak))
        return (1 + 0.2 * away + 0.5 * (setting.threads != threads)) * (1 + (noise[t % 7] if t % 3 else 0))

    climb = climbed(seconds)
    assert climb.converged and climb.best == Trial(peak, threads)


def test_a_small_gain_keeps_the_setting():
    climb = climbed(lambda setting, t: 1 - 0.01 * setting.threads)
    assert climb.converged and climb.best == Trial(1.0, 1)


def test_the_first_round_does_not_count():
    assert climbed(lambda setting, t: 100.0 if t == 0 else setting.chunk).best.chunk == min(CHUNKS)


def test_a_round_without_clients_tunes_nothing():
    climb = Tuning()
    climb.setting(Trial(1.0, 1))
    climb.record(0, 1.0)
    assert not climb.converged
