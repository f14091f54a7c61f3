"""The public names of `import atoll`: sorted, complete, lazy."""

import importlib
import importlib.metadata
import subprocess
import sys

import atoll


def test_names_are_sorted_and_there():
    assert list(atoll.__all__) == sorted(atoll.__all__)
    for name in atoll.__all__:
        assert getattr(atoll, name) is not None
    assert set(atoll.__all__) <= set(dir(atoll))


def test_version_is_that_of_the_package():
    assert atoll.__version__ == importlib.metadata.version("atoll")


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(atoll, "tarin")


def fresh(code):
    """The output of a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_late_and_train_is_the_function():
    assert fresh('import sys, atoll; print("torch" in sys.modules, "typing" in sys.modules)') == "False False"
    importlib.import_module("atoll.training.train")  # a module of the name of the function
    assert callable(atoll.train) and (atoll.train.__name__, atoll.Observer.__name__) == ("train", "Observer")
