"""Settings for all tests: the examples of hypothesis, and a check of the line to write of each error.

hypothesis takes the same examples on every machine, and has no deadline, since some are slow.

No test cuts the power of the machine, so the processes of tests do not wait for the disk.

`make test` leaves out slow tests and most examples. HYPOTHESIS_PROFILE=search draws new examples and more of them. Use
it to search for bugs, not in CI.
"""

import copy
import gc
import os
import random
import sys

import pytest
from _pytest.doctest import DoctestModule
from cyclopts import App
from cyclopts.argument import ArgumentCollection
from hypothesis import HealthCheck, settings

from atoll.base.errors import AtollError
from atoll.base.lines import forms

NO_HURRY = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, deadline=None, max_examples=50, suppress_health_check=NO_HURRY)
settings.register_profile("quick", settings.get_profile("same"), max_examples=4)
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=NO_HURRY)


def pytest_configure(config):
    """Load the profile before a test module is read, since the `settings` of a test extend those of the profile."""
    usual = "quick" if config.option.markexpr == "not slow" else "same"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", usual))


def pytest_runtest_setup():
    """Seed the global generators: torch and NumPy start from random seeds, and modules without a key draw from them."""
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)  # torch.manual_seed imports torch._dynamo, for seconds
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    random.seed(0)


@pytest.fixture
def known_secrets():
    """The secrets of rounds follow from a seed, so that two runs with noise are equal."""
    from atoll.testing import entropy_source, known_entropy

    with entropy_source(known_entropy(0)):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Only modules of the package have examples: `--doctest-modules` does not search those of tests."""
    found = yield
    return [each for each in found if not isinstance(each, DoctestModule)]


def pytest_collection_finish():
    """Modules and collected tests live until the end, so the garbage collector does not visit them again."""
    gc.freeze()


def remembered(assemble):
    """`App.assemble_argument_collection`, which reads the signature of each command once.

    It takes most of the time of a short command. A command changes the arguments, so that each gets a copy.
    """
    known = {}

    def assembled(app, *, default_parameter=None, parse_docstring=False):
        def fresh(argument):
            if id(argument) not in made:
                made[id(argument)] = new = copy.copy(argument)
                new.tokens, new.children = [], ArgumentCollection(map(fresh, argument.children))
            return made[id(argument)]

        key, made = (app.default_command, app.app_stack.default_parameter, default_parameter, parse_docstring), {}
        if key not in known:
            known[key] = assemble(app, default_parameter=default_parameter, parse_docstring=parse_docstring)
        return ArgumentCollection(map(fresh, known[key]))

    return assembled


App.assemble_argument_collection = remembered(App.assemble_argument_collection)


def without_wait(file):
    """`os.fsync` without the wait for the disk, which takes milliseconds of each small file."""
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = without_wait


class Lines:
    """The lines to write of all errors that the package makes, each checked once, in the first test that meets it.

    The errors themselves are not kept, because an error refers to all objects of its frames.
    """

    def __init__(self):
        self.new, self.checked = [], set()

    def record(self, function):
        """A method of `AtollError` after which the line is recorded, if the package called it."""

        def recorded(error, *args, **words):
            out = function(error, *args, **words)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("atoll."):
                self.new.append((error.given, error.write))
            return out

        return recorded

    def check(self):
        """Raise an AssertionError if an error has no first part, or a line that cannot be read at one of its doors."""
        new, self.new = self.new, []
        if new:
            import doors  # which imports torch
        for given, write in new:
            assert given.strip(), "an error without its first part, the given value"
            texts = forms(write)
            if texts not in self.checked:
                self.checked.add(texts)
                doors.check(write)


LINES = Lines()
AtollError.__init__ = LINES.record(AtollError.__init__)
AtollError.writing = LINES.record(AtollError.writing)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Run a test, then check the lines of its errors."""
    LINES.new.clear()
    out = yield
    LINES.check()
    return out
