"""Feature shift is a function of (seed, client, row), applied when rows are read."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.data import Backdoor, ByColumn, Dirichlet, FeatureShift, LabelFlip, arrays, load
from atoll.data.shift import rotate, with_trigger

sides = st.integers(1, 9)


@cache
def digits():
    return load("digits")


@given(seed=st.integers(0, 99), side=sides, turns=st.integers(-5, 5))
def test_quarter_turns_move_whole_pixels(seed, side, turns):
    x = Key(seed).uniform(2 * 3 * side * side).float().reshape(2, 3, side, side)
    turned = rotate(x, torch.full((2,), 90.0 * turns))
    assert torch.equal(turned, torch.rot90(x, turns, (-2, -1)))


@given(side=st.integers(4, 9), degrees=st.floats(-360, 360))
def test_rotation_keeps_norms(side, degrees):
    """A disc that fades to 0 inside the frame does not change under rotation."""
    line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    radius = (line[:, None] ** 2 + line**2).sqrt()
    disc = (1 - 2 * radius / side).clamp(min=0)[None]
    turned = rotate(disc, torch.tensor([degrees]))
    assert (turned - disc).abs().max() < 0.25 and (turned.sum() / disc.sum() - 1).abs() < 0.15
    assert turned.min() >= 0 and turned.max() <= 1


def test_noise_has_the_stated_sd_at_every_client():
    """Client i of 4 gets noise of standard deviation 0.8 (i + 1) / 4, to 4 standard errors."""
    plain = arrays(torch.full((400, 50), 3.0), torch.zeros(400))
    data = plain.split(4, FeatureShift(noise=0.8), held_out=0)
    for client in range(4):
        noise = data.take(data.client_rows(client))[0] - 3.0
        sd = 0.8 * (client + 1) / 4
        assert noise.std() == pytest.approx(sd, rel=4 / (2 * noise.numel()) ** 0.5)
        assert abs(noise.mean()) < 4 * sd / noise.numel() ** 0.5


def test_rotation_goes_up_by_client():
    data, plain = load("digits").split(4, FeatureShift(rotation=90)), load("digits").split(4)
    for client in range(4):
        rows = data.client_rows(client)
        assert torch.equal(data.take(rows)[0], torch.rot90(plain.take(rows)[0], client, (-2, -1)))


@given(seed=st.integers(0, 50))
def test_a_row_looks_the_same_in_every_batch(seed):
    data = digits().split(5, FeatureShift(noise=0.3, rotation=15), seed=seed)
    rows = data.order[Key(seed).permutation(len(data.order))[:24]]
    x = data.take(rows)[0]
    assert torch.equal(data.take(rows.reshape(4, 6))[0].flatten(0, 1), x)
    assert torch.equal(data.take(rows[7:9])[0], x[7:9])
    assert torch.equal(data.pooled().take(rows)[0], x)  # pooled rows keep the shift of their clients
    assert torch.equal(data.only(torch.tensor([3])).take(rows)[0], x)


def test_another_seed_is_other_noise_and_held_out_rows_have_none():
    one, two = (load("digits").split(5, FeatureShift(noise=0.3), seed=s) for s in (0, 1))
    rows = one.order[:5]
    assert not torch.equal(one.take(rows)[0], two.take(rows)[0])
    held = torch.arange(10)
    assert torch.equal(one.held().take(held)[0], load("digits").split(5).held().take(held)[0])
    assert one.take(rows[:0])[0].shape == (0, 1, 8, 8)


def test_labels_of_a_share_of_clients_are_flipped():
    """Attackers have class 9 − y in training and in the counts of classes; held-out rows keep their labels."""
    flipped, plain = (digits().split(10, by, seed=4) for by in (LabelFlip(0.3, Dirichlet(1.0)), Dirichlet(1.0)))
    assert torch.equal(flipped.order, plain.order) and torch.equal(flipped.offsets, plain.offsets)
    changed = []
    for client in range(10):
        rows = plain.client_rows(client)
        (x, y), (z, label) = flipped.take(rows), plain.take(rows)
        assert torch.equal(x, z) and (torch.equal(y, label) or torch.equal(y, 9 - label))
        assert torch.equal(flipped.rows.targets()[rows], y)
        changed.append(not torch.equal(y, label))
    assert sum(changed) == 3
    every = torch.arange(len(plain.held_out))
    assert torch.equal(flipped.held_out.take(every)[1], plain.held_out.take(every)[1])
    assert flipped.held_view is plain.held_view is None
    none = digits().split(10, LabelFlip(0.0, Dirichlet(1.0)), seed=4)
    assert torch.equal(none.rows.targets(), plain.rows.targets())
    assert LabelFlip(0.2, ByColumn()).natural and LabelFlip(0.2, Dirichlet(1.0)).draws == Dirichlet(1.0).draws


def test_half_of_the_rows_of_a_share_of_clients_have_the_trigger():
    by = Backdoor(2, 0.3, Dirichlet(1.0), size=2, value=9.0)
    poisoned, plain = (digits().split(10, by, seed=4) for by in (by, Dirichlet(1.0)))
    shares = []
    for client in range(10):
        rows = plain.client_rows(client)
        (x, y), (z, label) = plain.take(rows), poisoned.take(rows)
        bad = (z != x).flatten(1).any(1)
        assert bool((label[bad] == 2).all()) and torch.equal(label[~bad], y[~bad])
        assert torch.equal(z[bad], with_trigger(x[bad], 2, 9.0)) and torch.equal(poisoned.rows.targets()[rows], label)
        assert torch.equal(poisoned.take(rows[:4].reshape(2, 2))[0].flatten(0, 1), z[:4])
        shares.append(float(bad.double().mean()))
    assert sorted(share > 0 for share in shares) == [False] * 7 + [True] * 3 and 0.3 < max(shares) < 0.8
    every = torch.arange(len(plain.held_out))
    assert torch.equal(poisoned.held_out.take(every)[0], plain.held_out.take(every)[0])
    image = with_trigger(torch.zeros(1, 1, 4, 4), 2, 1.0)
    assert image.sum() == 4 == image[..., 2:, 2:].sum()


def test_a_flip_that_cannot_be_is_refused():
    for make, words in (
        (lambda: digits().split(4, LabelFlip(0.2)), "at least one client, 0.25"),
        (lambda: load("diabetes").split(4, LabelFlip(0.3)), "one class per row"),
        (lambda: LabelFlip(0.2, LabelFlip()), "another partition"),
        (lambda: Backdoor(0, 0.2, LabelFlip()), "another partition"),
        (lambda: Backdoor(0, size=0), "size"),
        (lambda: digits().split(4, Backdoor(0)), "at least one client, 0.25"),
        (lambda: digits().split(9, Backdoor(11)), "from 0 to 9"),
    ):
        with pytest.raises(UsageError, match=words):
            make()
