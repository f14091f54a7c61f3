"""Laws of partitions: each row belongs to one client, each client has enough rows, equal keys give equal draws."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_cases import one_in, only
from scipy.stats import gamma, kstest

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.data import (
    IID,
    ArrayRows,
    ByColumn,
    Dirichlet,
    FeatureShift,
    Partition,
    Pathological,
    Pool,
    Quantity,
    Shards,
    Source,
)
from atoll.data.partition import fill_up, log_gamma_draws

DRAWN = [IID(), Dirichlet(0.1), Dirichlet(5.0), Pathological(2), Shards(), Shards(3), Quantity(1.5), Quantity(0)]
keys = st.integers(0, 2**32).map(Key)


def pool(rows, classes=5, seed=0):
    return Pool(rows, Key(seed).integers(rows, classes))


def source(rows, classes=5, seed=0):
    labels = pool(rows, classes, seed).labels
    names = tuple(map(str, range(classes)))
    return Source("made", ArrayRows(torch.arange(rows)[:, None].float(), labels), "classification", names, (1,))


@pytest.mark.parametrize("partition", DRAWN, ids=repr)
@given(key=keys, clients=st.integers(3, 12), rows=st.integers(40, 150))
def test_every_row_has_one_owner_and_the_same_key_gives_the_same(partition, key, clients, rows):
    owner = partition(pool(rows), clients, key)
    assert owner.shape == (rows,)
    assert set(owner.tolist()) <= set(range(clients))
    assert torch.equal(owner, partition(pool(rows), clients, key))


@pytest.mark.parametrize("partition", one_in(2, DRAWN), ids=repr)
@given(seed=st.integers(0, 1000), clients=st.integers(3, 12), min_rows=st.integers(1, 5))
def test_split_gives_every_train_row_to_one_client_and_min_rows_to_each(partition, seed, clients, min_rows):
    data = source(100).split(clients, partition, seed=seed, min_rows=min_rows)
    assert data.count == clients
    assert data.sizes.min() >= min_rows
    held = data.held().rows.take(torch.arange(20))[0].flatten().long()
    assert torch.equal(torch.cat((data.order, held)).sort().values, torch.arange(100))
    again = source(100).split(clients, partition, seed=seed, min_rows=min_rows)
    assert torch.equal(data.order, again.order) and torch.equal(data.offsets, again.offsets)


@pytest.mark.parametrize("partition", DRAWN, ids=repr)
def test_another_seed_is_another_draw(partition):
    one, two = (source(200).split(5, partition, seed=seed, held_out=0) for seed in (0, 1))
    assert not torch.equal(one.order, two.order)


@pytest.mark.parametrize("partition", [*DRAWN, FeatureShift(noise=0.1), ByColumn()], ids=repr)
def test_a_partition_is_a_value(partition):
    again = eval(repr(partition))  # the text is our own repr, a constructor call
    assert again == partition and hash(again) == hash(partition) and repr(again) == repr(partition)
    with pytest.raises(AttributeError):
        partition.draws_more = 1


@given(key=keys, clients=st.integers(1, 30), rows=st.integers(30, 100))
def test_iid_sizes_differ_by_at_most_one(key, clients, rows):
    sizes = IID()(pool(rows), clients, key).bincount(minlength=clients)
    assert sizes.max() - sizes.min() <= 1


def test_iid_is_uniform():
    """Each of 4 rows is assigned to each of 4 clients equally often; the false-alarm rate is below 10⁻⁵."""
    draws = torch.stack([IID()(Pool(4), 4, Key(seed)) for seed in range(2000)])
    counts = torch.stack([(draws == client).sum(0) for client in range(4)])
    chi2 = ((counts - 500.0) ** 2 / 500).sum()
    assert chi2 < 40  # 9 degrees of freedom: P(χ² > 40) < 10⁻⁵


@pytest.mark.slow
def test_dirichlet_grows_even_with_alpha():
    """A larger alpha gives less skew in the mean over seeds: from almost one class per client to equal mixes."""
    data = source(2000, classes=10)

    def skew(partition):
        return sum(data.split(20, partition, seed=s).imbalance()["label_divergence"] for s in range(5)) / 5

    values = [skew(Dirichlet(alpha)) for alpha in (0.01, 0.1, 1.0, 10.0, 1000.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.6
    assert values[-1] < 0.001


def test_dirichlet_gives_no_more_to_a_client_with_its_share():
    owner = Dirichlet(0.5)(pool(1000, classes=10), 10, Key(0))
    # One class has about 100 rows and may push a client past its fair share of 100. A second class may not.
    assert owner.bincount().max() < 100 + 130


@pytest.mark.slow
def test_dirichlet_shares_have_the_stated_moments():
    """With one class, shares are Dirichlet: mean 1/C, variance (C − 1) / (C² (Cα + 1)), to 4 standard errors."""
    clients, alpha, rows, seeds = 5, 0.7, 2000, 200
    shares = torch.stack(
        [
            Dirichlet(alpha)(Pool(rows, torch.zeros(rows, dtype=torch.int64)), clients, Key(s)).bincount(
                minlength=clients
            )
            / rows
            for s in range(seeds)
        ]
    ).double()
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert (shares.mean(0) - 1 / clients).abs().max() < 4 * math.sqrt(variance / seeds)
    assert shares.var(0).mean() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("shape", [0.05, 0.5, 1.0, 7.0])
def test_gamma_draws_have_the_distribution(shape):
    """Kolmogorov–Smirnov test at 10⁻⁴. The keys are fixed, so the test never fails by chance."""
    draws = log_gamma_draws(shape, 20_000, Key(3)).exp().numpy()
    assert kstest(draws, gamma(shape).cdf).pvalue > 1e-4


def test_gamma_draws_do_not_underflow():
    assert torch.isfinite(log_gamma_draws(1e-6, 1000, Key(0))).all()


@given(key=keys, clients=st.integers(1, 40), k=st.integers(1, 6))
def test_pathological_gives_k_classes_to_each_and_splits_each_evenly(key, clients, k):
    rows, classes = 600, 5
    labels = torch.arange(rows) % classes
    if clients * min(k, classes) < classes:
        with pytest.raises(UsageError, match="without a holder"):
            Pathological(k)(Pool(rows, labels), clients, key)
        return
    owner = Pathological(k)(Pool(rows, labels), clients, key)
    table = torch.zeros(clients, classes, dtype=torch.int64).index_put_(
        (owner, labels), torch.tensor(1), accumulate=True
    )
    assert ((table > 0).sum(1) == min(k, classes)).all()
    for shares in table.T:
        held = shares[shares > 0]
        assert held.max() - held.min() <= 1
    if clients >= classes:  # client i holds class i mod K
        assert (table[torch.arange(clients), torch.arange(clients) % classes] > 0).all()


@given(key=keys, clients=st.integers(1, 20), s=st.integers(1, 4))
def test_shards_give_few_classes_and_equal_sizes(key, clients, s):
    rows, classes = 400, 4
    labels = torch.arange(rows) % classes
    owner = Shards(s)(Pool(rows, labels), clients, key)
    sizes = owner.bincount(minlength=clients)
    assert sizes.max() - sizes.min() <= s
    widest = -(-classes // (clients * s)) + 1  # classes that one shard can touch
    for client in range(clients):
        assert len(labels[owner == client].unique()) <= s * widest


@given(key=keys, power=st.floats(0, 3), clients=st.integers(1, 20))
def test_quantity_follows_the_power_law(key, power, clients):
    rows = 10_000
    sizes = Quantity(power)(Pool(rows), clients, key).bincount(minlength=clients)
    law = torch.arange(1, clients + 1, dtype=torch.float64) ** -power
    assert (sizes - rows * law / law.sum()).abs().max() <= 1
    assert sizes.sum() == rows


@given(
    key=keys,
    sizes=st.lists(st.integers(0, 30), min_size=2, max_size=12),
    min_rows=st.integers(1, 6),
)
def test_fill_up_moves_no_more_rows_than_are_missing(key, sizes, min_rows):
    sizes = torch.tensor(sizes)
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    if len(owner) < len(sizes) * min_rows:
        return
    moved = fill_up(owner, len(sizes), min_rows, key)
    after = moved.bincount(minlength=len(sizes))
    assert after.min() >= min_rows
    assert (moved != owner).sum() == (min_rows - sizes).clamp(min=0).sum()
    # The largest clients lose rows, down to one common level.
    givers = after[after < sizes]
    assert not len(givers) or givers.max() - givers.min() <= 1


def test_moved_rows_have_a_note():
    data = source(100).split(20, Quantity(2.0))
    assert any("rows were moved" in note and "min_rows=2" in note for note in data.notes)
    assert not any("moved" in note for note in source(100).split(20, IID()).notes)


def test_a_repeated_draw_has_a_note():
    notes = (note for s in range(30) for note in source(300).split(15, Dirichlet(0.3), seed=s).notes)
    assert any("is the first with min_rows=2" in note for note in notes)


def test_a_partition_of_ones_own_is_checked():
    @dataclass(frozen=True, repr=False)
    class Odd(Partition):
        def __call__(self, pool, clients, key):
            return torch.full((pool.rows,), clients)

    with pytest.raises(UsageError, match="returned owners"):
        source(100).split(4, Odd())


@pytest.mark.parametrize("clients", only([50_000], [50_000, 1_000_000]))
def test_many_clients(clients):
    """For every partition, a million clients need only an array of row numbers and an array of offsets."""
    rows = 2 * clients
    labels = torch.arange(rows) % 10
    big = Source("big", ArrayRows(torch.zeros(rows, 1), labels), "classification", ("a",) * 10, (1,))
    for partition in (IID(), Shards(2), Quantity(0.1)):
        data = big.split(clients, partition, held_out=0, min_rows=1)
        assert data.count == clients and data.sizes.sum() == rows
        assert data.order.numel() + data.offsets.numel() == rows + clients + 1
        few = data.only(torch.tensor([clients - 1, 3]))
        assert torch.equal(few.client_rows(0), data.client_rows(clients - 1))


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda: Dirichlet(0), "Dirichlet(0.3)"),
        (lambda: Dirichlet(math.inf), "Dirichlet(0.3)"),
        (lambda: Dirichlet("x"), "Dirichlet(0.3)"),
        (lambda: Pathological(0), "Pathological(2)"),
        (lambda: Pathological(1.5), "Pathological(2)"),
        (lambda: Shards(0), "Shards()"),
        (lambda: Quantity(-1), "Quantity(1.5)"),
        (lambda: FeatureShift(), "FeatureShift(noise=0.1)"),
        (lambda: FeatureShift(noise=-1), "FeatureShift(noise=0.1)"),
        (lambda: FeatureShift(noise=math.nan, rotation=90), "FeatureShift(noise=0.1, rotation=90.0)"),
    ],
)
def test_arguments_are_checked_at_construction(make, write):
    with pytest.raises(UsageError) as error:
        make()
    assert error.value.line == write
