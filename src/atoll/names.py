"""Names: code by `module:name`, and the prefixes by which tensors of several parts share one mapping.

Tests: tests/surface/test_names.py
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from atoll.errors import UsageError

T = TypeVar("T")


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


def load_from_user(name: str) -> Any:
    """The object of a name that a user typed. The working folder is searched last.

    Raises:
        UsageError: the module or the name does not exist.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return load(name)
    except (ImportError, AttributeError) as error:
        module, _, path = name.partition(":")
        raise UsageError(
            f"{name} cannot be imported: {error}.",
            "a module that is installed or in the working folder, and a name in it.",
            write=f'python -c "from {module} import {path}"',
        ) from None


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
