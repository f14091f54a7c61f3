"""The shared parameters of recipes are declared once, and `help` and `inspect` list them for each recipe."""

import inspect
from typing import get_type_hints

import pytest

from atoll import recipes
from atoll.plan.plan import Plan

SHARED = {
    "lr": recipes.Rate,
    "epochs": recipes.Epochs,
    "steps": recipes.Steps,
    "batch": recipes.Batch,
    "cohort": recipes.Cohort,
    "server_lr": recipes.ServerRate,
    "staleness": recipes.Staleness,
}


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.__name__)
def test_parameters_are_declared_once_and_described(recipe):
    signature, hints = inspect.signature(recipe), get_type_hints(recipe, include_extras=True)
    assert isinstance(recipe(), Plan)
    for name, parameter in signature.parameters.items():
        assert parameter.default is not parameter.empty
        assert hints[name] == SHARED.get(name, hints[name]), f"{name} has another type than in other recipes"
        assert f"\n    {name}: " in inspect.getdoc(recipe) or name in recipe.__doc__.split("Args:")[1], name
