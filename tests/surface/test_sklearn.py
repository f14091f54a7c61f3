"""The estimators of scikit-learn: its own checks, pipelines, searches, routed clients, and coefficients."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import atoll
from atoll.base.errors import Note
from atoll.sklearn import FederatedClassifier, FederatedRegressor


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([FederatedClassifier(rounds=10), FederatedRegressor(rounds=30)])
def test_the_checks_of_scikit_learn(estimator, check) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def fitted(iris):
    return FederatedClassifier(recipe="fedavg(lr=0.5)", clients=5, rounds=10).fit(*iris)


def test_equal_arguments_give_equal_models_and_a_pickle_predicts_the_same(iris, fitted) -> None:
    X, y = iris
    again = clone(fitted).fit(X, y)
    np.testing.assert_array_equal(again.coef_, fitted.coef_)
    restored = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(restored.predict_proba(X), fitted.predict_proba(X))
    assert not hasattr(restored, "run_")


def test_probabilities_decisions_and_classes_agree(iris, fitted) -> None:
    X, y = iris
    np.testing.assert_allclose(fitted.predict_proba(X).sum(1), 1)
    np.testing.assert_array_equal(fitted.predict(X), fitted.classes_[fitted.decision_function(X).argmax(1)])
    np.testing.assert_allclose(X @ fitted.coef_.T + fitted.intercept_, fitted.decision_function(X), atol=1e-9)
    assert fitted.score(X, y) > 0.9 and fitted.n_iter_ == 10 == len(fitted.history_)


def test_text_labels_in_a_pipeline_and_a_search(iris) -> None:
    X, y = iris
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    search = GridSearchCV(
        FederatedClassifier(clients=5, rounds=3), {"recipe": ["fedavg(lr=0.01)", "fedavg(lr=0.5)"]}, cv=2
    )
    search.fit(X, names)
    assert search.best_params_ == {"recipe": "fedavg(lr=0.5)"}
    pipeline = make_pipeline(StandardScaler(), FederatedClassifier(clients=5, rounds=3)).fit(X, names)
    assert set(pipeline.predict(X)) <= set(names)


def test_the_owner_of_each_row_is_its_client(iris) -> None:
    X, y = iris
    owner = np.array(["a", "b", "c"])[np.arange(len(X)) % 3]
    model = FederatedClassifier(rounds=2).fit(X, y, clients=owner)
    assert [report.arrived for report in model.run_.reports] == [3, 3] or len(model.run_.reports) == 2
    with pytest.raises(ValueError, match="one client for each of 150 rows"):
        model.fit(X, y, clients=owner[:10])


def test_clients_are_routed_through_a_search(iris) -> None:
    import sklearn

    X, y = iris
    owner = np.arange(len(X)) % 3
    with sklearn.config_context(enable_metadata_routing=True):
        estimator = FederatedClassifier(rounds=2).set_fit_request(clients=True)
        search = GridSearchCV(estimator, {"rounds": [1]}, cv=2).fit(X, y, clients=owner)
    assert len(search.best_estimator_.run_.reports) == 1


SGD = "sgd(20.0, momentum=0.95)"


@pytest.mark.parametrize(
    ("recipe", "rounds", "tolerance"),
    [
        ("newton()", 15, 1e-6),
        # Gradient descent with momentum; gd(lr=28.0) needs 10,900 rounds.
        pytest.param(f"Plan(Gradient(), aggregator=Mean(), optimizer={SGD})", 900, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_coefficients_equal_logistic_regression(recipe, rounds, tolerance) -> None:
    """The first five columns contain radius, perimeter and area: the curvatures differ by a factor of 1,400."""
    X, y = load_breast_cancer(return_X_y=True)
    scale = StandardScaler().fit(X[:, :5])
    reference = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(scale.transform(X[:, :5]), y)
    model = FederatedClassifier(recipe=recipe, clients=7, rounds=rounds).fit(X[:, :5], y)
    np.testing.assert_allclose(model.coef_, reference.coef_ / scale.scale_, rtol=tolerance)


def test_regression_equals_least_squares_in_the_units_of_the_target() -> None:
    X, y = load_diabetes(return_X_y=True)
    X = X[:, :4]
    model = FederatedRegressor(recipe="gd(lr=0.5)", clients=5, rounds=60).fit(X, y)
    reference = LinearRegression().fit(X, y)
    np.testing.assert_allclose(model.coef_, reference.coef_, rtol=1e-6)
    assert model.intercept_ == pytest.approx(reference.intercept_, rel=1e-9)
    np.testing.assert_allclose(model.predict(X), reference.predict(X), rtol=1e-6)


def test_partial_fit_continues_with_the_scale_of_the_first_call(iris) -> None:
    X, y = iris
    model = FederatedClassifier(recipe="fedavg(lr=0.5)", clients=5)
    model.partial_fit(X, y, classes=[0, 1, 2])
    first = model.input_
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)  # the fitted module is in evaluation mode
        for _ in range(4):
            model.partial_fit(X, y)
    assert model.input_.statistics == first.statistics and model.n_iter_ == 5
    assert model.score(X, y) > 0.8
    with pytest.raises(ValueError, match="not in classes"):
        model.partial_fit(X, y + 1)


def test_class_weights_by_name(iris) -> None:
    X, y = iris
    plain = FederatedClassifier(rounds=5, clients=5).fit(X, y)
    weighted = FederatedClassifier(rounds=5, clients=5, class_weight={0: 1, 1: 50, 2: 1}).fit(X, y)
    assert (weighted.predict(X) == 1).sum() > (plain.predict(X) == 1).sum()
    with pytest.raises(atoll.UsageError, match="class 'x'"):
        FederatedClassifier(rounds=1, class_weight={"x": 1.0}).fit(X, y)


def test_bad_input(iris) -> None:
    X, y = iris
    with pytest.raises(ValueError, match="one class"):
        FederatedClassifier().fit(X, np.zeros(len(X)))
    with pytest.raises(ValueError, match="1 sample"):
        FederatedClassifier().fit(X[:1], y[:1])
    noised = "dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=0.5)"
    with pytest.raises(atoll.UsageError, match="standard") as error:
        FederatedClassifier(recipe=noised, rounds=1).fit(X, y)
    assert 'input="input.json"' in str(error.value)
    with pytest.warns(Note, match="2 clients instead of 10"):
        FederatedClassifier(rounds=1).fit(X[48:52], y[48:52])
    with pytest.raises(TypeError):
        import scipy.sparse

        FederatedClassifier().fit(scipy.sparse.csr_matrix(X), y)
    with pytest.raises(ValueError):
        FederatedClassifier().fit(X.astype(str).astype(object) + "a", y)
    with pytest.raises(AttributeError, match="linear"):
        _ = FederatedClassifier("mlp", rounds=1, clients=2).fit(X, y).coef_
