"""Converts settings from and to texts: in a TOML file, after `--set`, and in the environment.

Tests: tests/surface/test_experiment.py, tests/surface/test_settings.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from atoll.base.concepts import own_model
from atoll.base.errors import UsageError
from atoll.base.files import no_such_file
from atoll.base.lines import Change, Line, literal, quoted
from atoll.base.validation import plain_number

TEXTS = tuple[str, ...]
DATA, METHOD, RUNNING, OUTPUT = "Data", "Model and plan", "Running", "Output"
GROUP_NAMES = (DATA, METHOD, RUNNING, OUTPUT)  # the groups of settings in `atoll run --help`
_TABLES = (".csv", ".tsv", ".txt", ".parquet", ".xlsx", ".xls", ".gz")
_YES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
_ASKED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", TEXTS: "a list of texts"}
_EXAMPLE: Mapping[Any, Any] = {int: 10, float: 0.1, bool: True, str: "…", TEXTS: ()}


def read_toml(file: Path) -> dict[str, Any] | None:
    """Read the settings of a TOML file. A pyproject.toml has them in [tool.atoll]; None if this section is missing.

    Raises:
        UsageError: the file is missing, or it is not UTF-8 or not TOML.
    """
    import tomllib

    if file.suffix.lower() in _TABLES and file.is_file():
        raise UsageError(
            f"{file} is a table.",
            "a TOML file of settings.",
            "the table is a setting of its own.",
            Line(f"atoll.data.load({literal(str(file))})", f"atoll run --data {quoted(str(file))}"),
        )
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise no_such_file(file, "a TOML file", lambda near: f"atoll run {quoted(near)}") from None
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"{file} cannot be read: {cause}.", "a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        why, write = own_model(file.name) if file.suffix == ".py" else ("", Line(file='data = "digits"'))
        raise UsageError(f"{file} is malformed: {error}.", "TOML.", why, write) from None
    if file.name != "pyproject.toml":
        return values
    section = values.get("tool", {}).get("atoll")
    return section if isinstance(section, dict) else None


def kinds(hint: Any) -> tuple[Any, ...]:
    """The types that the value of a setting may have, except None."""
    each = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(kind for kind in each if kind is not type(None))


def of_text(text: str, hint: Any) -> Any:
    """Convert a text to a value of the setting's type. It does not refuse a wrong type; `checked` does.

    Example:
        >>> of_text("5", int), of_text("wine", str | None), of_text("Seconds(9)", TEXTS), of_text("None", int | None)
        (5, 'wine', ['Seconds(9)'], None)
    """
    wanted = kinds(hint)
    if wanted != (hint,) and text in ("None", ""):
        return None
    if wanted == (bool,):
        return _YES.get(text.lower(), text)
    if wanted == (str,) and text[:1] not in ("'", '"'):
        return text
    if wanted == (TEXTS,) and text[:1] != "[":
        return [text]
    from atoll.base.grammar import parse

    try:
        return parse(text, {})
    except UsageError:
        return text


def checked(key: str, value: Any, hint: Any, default: Any, where: str) -> Any:
    """Convert a value to the type of its setting.

    Args:
        key: the key of the setting.
        value: the given value.
        hint: the type of the setting.
        default: the default of the setting. The error suggests it as a valid value.
        where: the source of the value, for the error: a file, `--set`, a variable, or "" for Python code.
    Raises:
        UsageError: the value is of another type.
    """
    if type(value) in kinds(hint):  # the usual case needs no library: its import takes 20 ms of a short command
        return value
    import msgspec

    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        kind, *_ = kinds(hint)
        right = _EXAMPLE[kind] if default is None else default
        raise UsageError(
            f"{where}{': ' if where else ''}{key} = {value!r}.",
            f"{_ASKED[kind]}.",
            write=f"{where}={toml(right)}" if where.startswith("ATOLL_") else Change(key, right),
        ) from None


def as_text(name: str, value: Any) -> Any:
    """Convert the value of a setting to a value that a file can contain. A text is not checked.

    Args:
        name: the name of the setting.
        value: the value: a number, a text, a path, an engine, a fleet, a stop rule, or several texts or rules.
    Raises:
        UsageError: the value has no text.
    """
    if name == "buffers" and isinstance(value, Mapping):
        return tuple(f"{pattern}={rule}" for pattern, rule in value.items())
    if name in ("metrics", "stop", "buffers") and value is not None:
        several = value if isinstance(value, (tuple, list)) else (value,)
        texts = [_one_text(name, each) for each in several]
        return tuple(name_by_name(texts)) if name == "metrics" else tuple(texts)
    return _one_text(name, value)


def name_by_name(values: Sequence[Any]) -> list[Any]:
    """Metrics one by one: a text may contain several names with commas between them.

    Example:
        >>> name_by_name(["auc,f1", "mine:near"])
        ['auc', 'f1', 'mine:near']
    """
    out: list[Any] = []
    for value in values:
        out += [name.strip() for name in value.split(",")] if isinstance(value, str) else [value]
    return out


def _one_text(name: str, value: Any) -> Any:
    """Convert one value of a setting."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(plain_number(value), (int, float)):
        return plain_number(value)
    if isinstance(value, Path):
        return str(value)
    if name == "class_weight" and isinstance(value, Mapping):
        return ",".join(f"{label}={weight!r}" for label, weight in value.items())
    if name == "tune":
        return repr(value)
    if name == "engine":
        from atoll.engine.spec import engine, spec_text

        return spec_text(engine(value))
    if name in ("fleet", "stop"):
        from atoll.base.grammar import parse
        from atoll.engine.simulation.fleet import FLEET
        from atoll.training.stop import RULES

        text = repr(value)
        try:
            if parse(text, FLEET if name == "fleet" else RULES) == value:
                return text
        except UsageError:
            pass  # the error below names the value
    raise UsageError(
        f"{name} = {value!r:.80}.",
        "a value that a file can contain.",
        "an experiment writes all its settings to config.toml.",
        Line(python=f"atoll.train(model, data, plan, {name}=...)"),
    )


def toml(value: Any) -> str:
    """Write a number, a text, a boolean or a list of such values as TOML.

    Raises:
        UsageError: the value is of another type.
    Example:
        >>> toml(True), toml('say "π"'), toml((1, 2.5))
        ('true', '"say \\\\"π\\\\""', '[1, 2.5]')
    """
    match value:
        case bool():
            return str(value).lower()
        case str():
            from json import dumps

            return dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple() | list():
            return f"[{', '.join(map(toml, value))}]"
        case Integral():
            return repr(int(value))
        case Real():
            return repr(float(value))
    raise UsageError(f"{value!r:.80} in a TOML file.", "a number, a text, a boolean, or a list of such values.")
