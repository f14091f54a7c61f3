"""Metrics equal those of scikit-learn, and sums over parts of the rows equal the sums over all rows."""

import math

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.base.errors import UsageError
from atoll.compute.metrics import AUC_BINS, METRICS, Counts, Metric, named_metric, row_sums, summed


def value(metric, output, y, parts=1):
    """The value of a metric from its sums, added over parts of the rows."""
    total = 0
    for some, labels in zip(output.chunk(parts), y.chunk(parts), strict=True):
        found = metric.sums(some, labels)
        if isinstance(found, Counts):
            total = total + found.added(torch.zeros(len(labels), dtype=torch.int64), 1)[0]
        else:
            assert len(found) == len(labels)
            total = total + found.double().sum(0)
    return metric.value(total, len(y))


def draw(rows, classes, seed=0, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=g)
    output = scale * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    output[torch.arange(rows), y] += scale
    return output, y


def test_two_classes_equal_scikit_learn():
    output, y = draw(500, 2)
    p, guess = output.softmax(1)[:, 1].numpy(), output.argmax(1).numpy()
    expected = {
        "accuracy": reference.accuracy_score(y, guess),
        "balanced_accuracy": reference.balanced_accuracy_score(y, guess),
        "f1": reference.f1_score(y, guess),
        "macro_f1": reference.f1_score(y, guess, average="macro"),
        "precision": reference.precision_score(y, guess),
        "recall": reference.recall_score(y, guess),
        "brier": reference.brier_score_loss(y, p),
        "log_loss": reference.log_loss(y, p),
    }
    for form in (output, (output[:, 1:] - output[:, :1]), output[:, 1] - output[:, 0]):
        for name, right in expected.items():
            for parts in (1, 7):
                assert value(METRICS[name], form, y, parts) == pytest.approx(right, abs=1e-9), name
        assert METRICS["auc"].over_rows(form, y) == pytest.approx(reference.roc_auc_score(y, p), abs=1e-12)


def test_many_classes_equal_scikit_learn():
    output, y = draw(700, 6, seed=1, scale=1.0)
    p, guess = output.softmax(1).numpy(), output.argmax(1).numpy()
    expected = {
        "accuracy": reference.accuracy_score(y, guess),
        "balanced_accuracy": reference.balanced_accuracy_score(y, guess),
        "macro_f1": reference.f1_score(y, guess, average="macro"),
        "top5": reference.top_k_accuracy_score(y, p, k=5),
        "log_loss": reference.log_loss(y, p),
        "brier": reference.brier_score_loss(y, p),
        "perplexity": math.exp(reference.log_loss(y, p)),
    }
    for name, right in expected.items():
        assert value(METRICS[name], output, y, 5) == pytest.approx(right, abs=1e-9), name
    table = value(METRICS["confusion"], output, y, 3)
    assert np.array_equal(table.numpy(), reference.confusion_matrix(y, guess))
    right = reference.roc_auc_score(y, p, multi_class="ovr")
    assert METRICS["auc"].over_rows(output, y) == pytest.approx(right, abs=1e-12)
    assert value(METRICS["auc"], output, y, 4) == pytest.approx(right, abs=1e-3)
    with pytest.raises(UsageError, match="macro_f1"):
        value(METRICS["f1"], output, y)


@pytest.mark.parametrize("spread", [0.003, 1.0, 40.0])
def test_auc_by_ranks_and_by_bins(spread):
    g = torch.Generator().manual_seed(3)
    y = (torch.rand(5000, generator=g) < 0.01).long()
    score = spread * (torch.randn(5000, generator=g, dtype=torch.float64) + y).clamp(-1, 1)
    right = reference.roc_auc_score(y, score)
    assert METRICS["auc"].over_rows(score, y) == pytest.approx(right, abs=1e-12)  # clamped scores have ties
    if spread >= 1:
        assert value(METRICS["auc"], score, y, 9) == pytest.approx(right, abs=1e-3)


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"confusion", "c_index", "f1", "precision", "recall"}))
@pytest.mark.parametrize("classes", [2, 4])
def test_the_values_of_clients_are_those_of_their_rows(name, classes):
    """Vectorised over clients, one of them without rows, and one with rows of one class."""
    output, y = draw(120, classes, seed=4)
    owner = torch.randint(4, (120,), generator=torch.Generator().manual_seed(1))
    owner[y == 0] += owner[y == 0] == 3  # client 3 has no row of class 0
    metric = METRICS[name]
    if name in ("rmse", "mae", "r2", "poisson_deviance"):
        output, y = output[:, 0], y.double()
    totals, rows = summed(row_sums(metric, output, y), owner, 6), owner.bincount(minlength=6)
    each = metric.each(totals, rows)
    for client in range(6):
        mine = owner == client
        right = value(metric, output[mine], y[mine]) if mine.any() else math.nan
        assert float(each[client]) == pytest.approx(right, nan_ok=True)
    if metric.over_rows:
        exact = metric.each_over_rows(output, y, owner, 6)
        for client in range(6):
            mine = owner == client
            right = metric.over_rows(output[mine], y[mine]) if mine.any() else math.nan
            assert float(exact[client]) == pytest.approx(right, nan_ok=True)


def test_several_labels_are_a_mean_over_labels():
    g = torch.Generator().manual_seed(5)
    y = (torch.rand(300, 4, generator=g) < 0.3).double()
    output = torch.randn(300, 4, generator=g, dtype=torch.float64) + y
    guess = (output > 0).long().numpy()
    expected = {
        "f1": reference.f1_score(y, guess, average="macro"),
        "precision": reference.precision_score(y, guess, average="macro"),
        "recall": reference.recall_score(y, guess, average="macro"),
        "accuracy": (guess == y.numpy()).mean(),
        "balanced_accuracy": np.mean([reference.balanced_accuracy_score(y[:, i], guess[:, i]) for i in range(4)]),
    }
    for name, right in expected.items():
        assert value(named_metric(name, labels=True), output, y, 3) == pytest.approx(right, abs=1e-9), name
    auc = named_metric("auc", labels=True)
    right = reference.roc_auc_score(y, output, average="macro")
    assert auc.over_rows(output, y) == pytest.approx(right, abs=1e-12)
    assert value(auc, output, y, 3) == pytest.approx(right, abs=1e-3)


def test_regression_equals_scikit_learn():
    g = torch.Generator().manual_seed(7)
    y = 1e7 + torch.randn(400, 2, generator=g, dtype=torch.float64)
    output = y + 0.5 * torch.randn(400, 2, generator=g, dtype=torch.float64)
    assert value(METRICS["rmse"], output, y, 3) == pytest.approx(math.sqrt(reference.mean_squared_error(y, output)))
    assert value(METRICS["mae"], output, y, 3) == pytest.approx(reference.mean_absolute_error(y, output))
    r2 = named_metric("r2", centre=1e7 + 3)
    assert value(r2, output, y, 3) == pytest.approx(reference.r2_score(y, output), rel=1e-9)
    counts = torch.poisson(torch.full((200,), 3.0, dtype=torch.float64), generator=g)
    log_rate = 1 + 0.1 * torch.randn(200, 1, generator=g, dtype=torch.float64)
    right = reference.mean_poisson_deviance(counts, log_rate[:, 0].exp())
    assert value(METRICS["poisson_deviance"], log_rate, counts, 3) == pytest.approx(right)


def test_calibration_error_equals_its_definition():
    output, y = draw(400, 3, seed=9, scale=0.7)
    p = output.softmax(1)
    top, guess = p.max(1)
    hit, place = (guess == y).double(), (top * 15).ceil()
    right = sum(
        float((top - hit)[place == b].mean().abs()) * float((place == b).double().mean())
        for b in range(16)
        if (place == b).any()
    )
    assert value(METRICS["ece"], output, y, 4) == pytest.approx(right, abs=1e-12)


@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 6))
def test_concordance_equals_the_count_over_all_pairs(seed, rows, levels):
    g = torch.Generator().manual_seed(seed)
    time = torch.randint(levels, (rows,), generator=g).double()
    event = torch.randint(2, (rows,), generator=g)
    risk = torch.randint(levels, (rows,), generator=g).double()
    pairs = good = 0.0
    for i in range(rows):
        for j in range(rows):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                good += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    found = METRICS["c_index"].over_rows(risk[:, None], torch.stack((time, event.double()), 1))
    assert math.isnan(found) if not pairs else found == good / pairs


def test_an_undefined_value_is_nan_and_never_zero():
    output, y = torch.tensor([[-1.0], [-2.0]]), torch.tensor([0, 0])
    for name in ("f1", "precision", "recall"):
        assert math.isnan(value(METRICS[name], output, y)), name
    assert math.isnan(METRICS["auc"].over_rows(output, y))
    assert math.isnan(value(METRICS["auc"], output, y))
    assert math.isnan(value(METRICS["r2"], torch.zeros(3, 1), torch.ones(3)))
    assert value(METRICS["balanced_accuracy"], output, y) == 1.0  # the class that has rows
    assert all(math.isnan(m.value(torch.zeros(AUC_BINS), 0)) for m in METRICS.values())


def test_a_metric_needs_a_function():
    with pytest.raises(UsageError, match="lambda output, y"):
        Metric("nothing", None)


def test_positions_without_a_label_are_not_counted():
    output, y = torch.randn(4, 5, 3), torch.randint(3, (4, 5))
    y[:, 3:] = -100
    table = value(METRICS["confusion"], output, y)
    assert float(table.sum()) == 12


def test_an_index_of_pairs_needs_one_output_and_a_time_with_an_event():
    y = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    for output, target in ((torch.zeros(2, 2), y), (torch.zeros(2), y[:, 0])):
        with pytest.raises(UsageError, match="c_index of outputs"):
            METRICS["c_index"].over_all(output, target)
