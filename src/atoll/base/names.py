"""Names: code by `module:name`, and the prefixes by which tensors of several parts share one mapping.

Tests: tests/surface/test_names.py
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from atoll.base.errors import UsageError, did_you_mean

T = TypeVar("T")

COUNTS = (  # the columns of a row that describe its cost and its clients; every other column is a metric
    *("round", "fingerprint", "cohort", "arrived", "failed", "late", "flying", "staleness", "versions"),
    *("bytes_up", "bytes_down", "seconds", "clock"),
)
RESERVED = (*COUNTS, "lr", "gradient_norm", "held_out_loss", "rows", "id")  # names that a run gives itself
ROWS_OF = "rows/"  # the prefix of a sum that counts the rows of one metric only


def with_noun(count: int, one: str, several: str = "") -> str:
    """A number with its noun, and with further words that agree with it.

    Args:
        count: the number.
        one: the words after 1.
        several: the words after every other number; empty: `one` with an s.
    Example:
        >>> with_noun(1, "row"), with_noun(0, "row"), with_noun(2, "row lacks", "rows lack")
        ('1 row', '0 rows', '2 rows lack')
    """
    return f"{count} {one if count == 1 else several or one + 's'}"


def metric_name(name: str) -> str:
    """The name under which a run reports a metric of a local part: `training_<name>` if the run uses the name itself.

    Example:
        >>> metric_name("auc"), metric_name("round")
        ('auc', 'training_round')
    """
    return f"training_{name}" if name in RESERVED or name.startswith(ROWS_OF) else name


def load(name: str) -> Any:
    """The object of a name such as `module:Class` or `module:Class.method`.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such name.
    Example:
        >>> load("json:dumps")([1])
        '[1]'
    """
    module, _, path = name.partition(":")
    return functools.reduce(getattr, path.split("."), importlib.import_module(module))


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that imports each of its public names at the first use.

    Args:
        package: the name of the package, its `__name__`.
        homes: the module of each name, relative to the package.
    Returns:
        The two functions, to be assigned in the package.
    Example:
        >>> get, names = lazy("json", {"JSONDecoder": "decoder"})
        >>> get("JSONDecoder").__name__, names()
        ('JSONDecoder', ['JSONDecoder'])
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        found = load(f"{package}.{homes[name]}:{name}")
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: sorted(homes)


def load_from_user(name: str) -> Any:
    """The object of a name that a user typed. The working folder is searched last.

    Raises:
        UsageError: the module or the name does not exist. The module has been executed if it exists.
    """
    module, _, path = name.partition(":")
    found = _module_of_user(module, path)
    try:
        return functools.reduce(getattr, path.split("."), found)
    except AttributeError:
        near = did_you_mean(path, [each for each, value in vars(found).items() if callable(value) and each[0] != "_"])
        raise UsageError(
            f"The module {module} has no class or function {path!r}.",
            "module:name.",
            write=f"{module}:{near}" if near else "",
        ) from None


def _module_of_user(module: str, path: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    cause = None
    if all(part.isidentifier() for part in module.split(".")):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            # If the module itself imports a package that is missing, the error names that package.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            cause = error
    spelled = module.removesuffix(".py").replace("/", ".").strip(".")
    raise UsageError(
        f"No module is called {module!r}.",
        "module:name, the module in the working folder or installed.",
        write=f"{spelled}:{path}" if spelled != module else "",
    ) from cause


def under(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """The values with a prefix before each name.

    Example:
        >>> under("codec/", {"error": 1})
        {'codec/error': 1}
    """
    return {prefix + name: value for name, value in values.items()}


def without_prefix(values: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The values whose name begins with a prefix, without the prefix.

    Example:
        >>> without_prefix({"codec/error": 1, "local/order": 2}, "codec/")
        {'error': 1}
    """
    return {name[len(prefix) :]: value for name, value in values.items() if name.startswith(prefix)}


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted keys.

    Example:
        >>> dotted({"rounds": 3, "plan": {"pace": "Sync()"}})
        {'rounds': 3, 'plan.pace': 'Sync()'}
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= dotted(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
