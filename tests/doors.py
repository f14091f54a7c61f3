"""Check the line to write of an error: it must be readable at the door of the reader.

Python: a value of the grammar, an expression, a statement, keyword arguments, or a command. Command line: a command
that the parser of `atoll` accepts, flags of `atoll run`, or a value of the grammar. File: TOML with known keys.
"""

import re
import shlex
import tomllib

from atoll import models, recipes
from atoll.base.errors import AtollError
from atoll.base.grammar import parse
from atoll.base.lines import DOORS, form
from atoll.base.names import load
from atoll.compute.loss import cross_entropy, huber, quantile
from atoll.data import held_out, partition
from atoll.engine.simulation.fleet import FLEET
from atoll.engine.spec import ENGINES
from atoll.plan.registry import PARTS
from atoll.track import MLflow, TensorBoard, WandB
from atoll.training.known_names import _Anything
from atoll.training.stop import RULES

PARTITIONS = {c.__name__: c for c in vars(partition).values() if isinstance(c, type) and c is not partition.Partition}
ENGINE_CLASSES = {spec.rpartition(":")[2]: load(spec) for spec in ENGINES.values()}
TABLES = (
    PARTS,
    RULES,
    PARTITIONS,
    FLEET,
    ENGINE_CLASSES,
    held_out.RULES,
    {each.__name__: each for each in (MLflow, TensorBoard, WandB)},
    {"cross_entropy": cross_entropy, "huber": huber, "quantile": quantile},
)
VALUES = {r.__name__: r for r in recipes.RECIPES} | {name: make for table in TABLES for name, make in table.items()}
OF_TESTS = dict.fromkeys(("Flip", "Round", "Shuffle", "Mine", "object"), _Anything)  # classes of tests
OPTIMIZERS_OF_TESTS = dict.fromkeys(("corrected", "fedprox"), lambda lr, **_: PARTS["sgd"](lr))
PROGRAMS = {
    "ls",
    "file",
    "head",
    "cat",
    "iconv",
    "sed",
    "rm",
    "df",
    "pip",
    "apt-get",
    "ray",
    "torchrun",
    "python",
    "unset",
}
PROGRAMS |= {"export", "xcode-select", "nvidia-smi", "chmod", "timedatectl"}
WORDS = {*models.names(), *VALUES, *ENGINES, "north", "north-1", "server.example.org:4433"}
CODE_OF_USER = re.compile(r"\b[a-z][\w.]*:[a-z]\w*\b")  # module:name, which need not exist
CODE = re.compile(r"\b(model|torch|nn|self|return|lambda|import|codec|integers|ctx|plan)\b")  # code in a user's module


def check(write):
    """Raise an AssertionError if a line cannot be read at one of its doors.

    Args:
        write: the line of an error, a text or a value of `atoll.base.lines`.
    """
    for door in DOORS:
        text = form(write, door)
        assert not text or _reads(text, door), f"at the door {door}: {text}"


def _reads(text, door):
    if text in WORDS or _value(text):
        return True
    if door == "python":
        return _command(text) or _python(text)
    if door == "file":
        return _toml(text) or _command(text) or (bool(CODE.search(text)) and _python(text))
    return _flags(["run", *shlex.split(text)]) if text.startswith("--") else _command(text) or bool(CODE.search(text))


def _value(text):
    for of_tests in (OF_TESTS, {**OF_TESTS, **OPTIMIZERS_OF_TESTS}):
        try:
            parse(CODE_OF_USER.sub("os.path:join", text), {**VALUES, **of_tests}, trust=True)
        except AtollError:
            continue
        return True
    return False


def _python(text):
    for each in (text, f"f({text})", f"def f():\n    {text}"):
        try:
            compile(each, "line", "exec")
        except SyntaxError:
            continue
        return True
    return False


def _command(text):
    words = shlex.split(text)
    if re.fullmatch(r"ATOLL_[A-Z_]+=.*", text):
        return True
    if words[:1] == ["atoll"]:
        return _flags(words[1:])
    return bool(words) and words[0] in PROGRAMS


def _flags(words):
    from cyclopts import CycloptsError

    from atoll.cli.app import app

    if "..." in " ".join(words):
        return False
    others = (["resume", "latest"], ["lr"], ["sweep"], ["predict", "latest", "x.csv"], ["export", "latest"])
    others += (
        ["new", "p"],
        ["compare", "a", "b"],
        ["serve", "--home", "at"],
        ["join", "token", "--home", "at", "--data", "x"],
        ["invite", "north", "--home", "at"],
    )
    for command in (words, *([*other, *words[1:]] for other in others)):
        try:
            app.parse_args(command, exit_on_error=False, print_error=False)
        except CycloptsError:
            continue
        return True
    return words in (["--help"], ["--trust"]) or words[-1:] == ["--help"]


def _toml(text):
    from atoll.base.names import dotted
    from atoll.training.experiment import Experiment

    try:
        Experiment()._of_file(dotted(tomllib.loads(text)), "experiment.toml", True)
    except (tomllib.TOMLDecodeError, AtollError):
        return False
    return True
