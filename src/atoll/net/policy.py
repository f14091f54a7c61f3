"""The policy of a site: a TOML file that limits what the site computes and sends. It is never sent.

    models = ["softmax", "mlp"]        parts = ["Train", "Mean", "sgd"]      names that a run may use
    min_cohort = 3                     max_rounds = 200                      of one run
    min_rows = 50                      per_client = false                    sums of held-out rows stay here
    bytes_per_day = 100000000          hours = "20:00-06:00"                 of this machine's clock; else it is absent
    ask = true                         a plan waits for `atoll approve`

Tests: tests/faults/test_policy.py
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from atoll.base.errors import UsageError
from atoll.base.files import atomic_write
from atoll.net.identity import identity_bytes
from atoll.net.terms import RefusedError
from atoll.net.wire import LeaveCode, Work, digest
from atoll.plan.local import Evaluate, Moments
from atoll.plan.plan import Plan
from atoll.plan.sampler import Everyone
from atoll.privacy.account import epsilon
from atoll.secure.client import Floors
from atoll.secure.params import topology

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_CALLED = re.compile(r"([A-Za-z_]\w*)\s*\(")
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_ASKED, _APPROVED = "asked.json", "approved.json"
_COMPOSED = frozenset({"Plan"})


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of a site. The default allows everything.

    Args:
        models: the names of the models that a run may use; None: any.
        parts: the names of the parts that a plan may use, nested ones included; None: any.
        min_cohort: the least number of clients that a round selects, and of a secure sum. With 1 a secure sum needs 5.
        secure: whether each round needs a secure sum, so that the server receives no update of this site.
        min_threshold: the least number of sites that together open the masks of one of them.
        identities: the file of the public identity keys that may be in a sum with this site, one in a line with a
            remark after it. None: the server names them, and must be honest.
        min_noise: the least noise multiplier of the plan.
        max_epsilon, delta: the largest ε of the run so far at this δ, by the accountant of this site. None: no limit.
        max_attempts: the most attempts of a secure sum in a round.
        max_rounds: the most rounds of one run; None: no limit.
        min_rows: the least number of train rows of this site.
        per_client: whether the site sends sums of its own rows: of its evaluation, and statistics of its columns. None:
            it does, unless `secure`, `min_noise` or `max_epsilon` is set, since these sums have no masks and no noise.
        bytes_per_day: the most bytes of messages of one day of UTC; None: no limit.
        hours: "HH:MM-HH:MM" in the time of this machine; outside the site is absent. None: always.
        ask: whether each plan waits for `atoll approve`.
    """

    models: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    min_cohort: Annotated[int, Meta(ge=1)] = 1
    secure: bool = False
    min_threshold: Annotated[int, Meta(ge=2)] = 2
    identities: str | None = None
    max_attempts: Annotated[int, Meta(ge=1)] = 2
    min_noise: Annotated[float, Meta(ge=0)] = 0.0
    max_epsilon: Annotated[float, Meta(gt=0)] | None = None
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    max_rounds: Annotated[int, Meta(ge=0)] | None = None
    min_rows: Annotated[int, Meta(ge=1)] = 1
    per_client: bool | None = None
    bytes_per_day: Annotated[int, Meta(ge=0)] | None = None
    hours: str | None = None
    ask: bool = False

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read a policy file.

        Raises:
            UsageError: there is no such file, or a rule is unknown or has another type.
        """
        try:
            found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Policy)
            if found.hours is not None and not _HOURS.fullmatch(found.hours):
                raise ValueError(f'hours = "{found.hours}"')
            if found.identities is not None:
                found = msgspec.structs.replace(found, identities=str(path.parent / found.identities))
                found.accepted()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.", "a policy file.") from None
        except (ValueError, msgspec.ValidationError) as error:
            known = ", ".join(cls.__struct_fields__)
            raise UsageError(
                f"The policy {path} is not valid: {error}.", f'the rules {known}; hours such as "20:00-06:00".'
            ) from None
        return found

    def accepted(self) -> frozenset[bytes] | None:
        """The public identity keys of `identities`; None if there is no such file.

        Raises:
            OSError: the file cannot be read.
            ValueError: a line has no key.
        """
        if self.identities is None:
            return None
        lines = Path(self.identities).read_text(encoding="utf-8").splitlines()
        return frozenset(identity_bytes(line.split()[0]) for line in lines if line.strip())

    @property
    def sends_values(self) -> bool:
        """Whether the site sends sums of its own rows."""
        protected = self.secure or self.min_noise > 0 or self.max_epsilon is not None
        return not protected if self.per_client is None else self.per_client

    @property
    def floors(self) -> Floors:
        """The least that this site accepts in a secure sum."""
        cohort = max(3, self.min_cohort) if self.min_cohort > 1 else Floors.cohort
        return Floors(cohort, threshold=self.min_threshold, noise=self.min_noise, attempts=self.max_attempts)

    def check_run(self, model: str, rows: int) -> None:
        """Refuse a model, and too few rows.

        Raises:
            RefusedError: the code is that of the rule.
        """
        if self.models is not None and model not in self.models:
            raise _refused("model", f"the model {model!r}")
        if rows < self.min_rows:
            raise _refused("rows", "a run with the rows of this site")

    def check_work(
        self, work: Work, plan: Plan, clients: int, made: Mapping[str, int | str] = MappingProxyType({})
    ) -> None:
        """Refuse a work whose plan, round or rows the policy does not allow.

        Args:
            work: the work.
            plan: its plan.
            clients: the clients of the run, of which the plan selects.
            made: the `contribution_name` of each work of the rounds of this run that the site has sent, by the work.
                The server states the number of a round, so the site counts for itself.
        Raises:
            RefusedError: the code is that of the rule.
        """
        if (work.kind != "round" or isinstance(plan.local, (Evaluate, Moments))) and not self.sends_values:
            raise _refused("values", "values of this site")
        if work.kind == "evaluate":
            return
        if self.parts is not None:
            used = set(_CALLED.findall(_QUOTED.sub("''", work.plan))) - _COMPOSED
            if not used <= set(self.parts):
                raise _refused("part", f"the part {min(used - set(self.parts))}")
        if self.max_rounds is not None:
            others = set(made.values()) - {contribution_name(work.work.hex(), work.round, work.sum is not None)}
            if max(work.round, len(others)) >= self.max_rounds:
                raise _refused("rounds", f"more than {self.max_rounds} rounds")
        if work.kind == "round" and self.min_cohort > 1 and _cohort(plan, clients) < self.min_cohort:
            raise _refused("cohort", f"cohorts of less than {self.min_cohort} clients")
        self._check_privacy(plan, clients, 1 + max(work.round, len(made) - (work.work.hex() in made)))

    def _check_privacy(self, plan: Plan, clients: int, rounds: int) -> None:
        """Refuse a plan whose sum or noise protects less than the policy asks."""
        masks = plan.aggregator.secure
        if self.secure and masks is None:
            raise _refused("secure", "a round without a secure sum")
        shape = None if masks is None else topology(_cohort(plan, clients), masks.neighbours, masks.threshold)
        if shape is not None and shape.threshold < self.min_threshold:
            raise _refused("threshold", f"a threshold of less than {self.min_threshold} sites")
        release = plan.codec.event(1.0)
        if release is None and (self.min_noise or self.max_epsilon is not None):
            raise _refused("noise", "a plan without noise")
        if release is not None and release.noise < self.min_noise:
            raise _refused("noise", f"noise below {self.min_noise:g}")
        if self.max_epsilon is not None:
            spent = epsilon(plan, clients=clients, rounds=rounds, delta=self.delta)
            if spent > self.max_epsilon:
                raise _refused("epsilon", f"more than ε = {self.max_epsilon:g}")

    def absence(self, now: datetime, sent: int) -> tuple[LeaveCode, float] | None:
        """Why the site is absent now, and for how many seconds; None if it is present.

        Args:
            now: the time, with a time zone.
            sent: the bytes of the messages of this day of UTC.
        Example:
            >>> from datetime import UTC
            >>> Policy(hours="20:00-06:00").absence(datetime(2026, 1, 1, 19, tzinfo=UTC), 0)
            ('hours', 3600.0)
        """
        if self.bytes_per_day is not None and sent >= self.bytes_per_day:
            utc = now - (now.utcoffset() or timedelta(0))
            passed = utc.hour * 3600 + utc.minute * 60 + utc.second
            return "bytes", 86400.0 - passed
        if self.hours is None:
            return None
        first, last = (int(part[:2]) * 60 + int(part[3:]) for part in self.hours.split("-"))
        minute = now.hour * 60 + now.minute
        inside = first <= minute < last if first <= last else minute >= first or minute < last
        return None if inside else ("hours", 60.0 * ((first - minute) % 1440) - now.second)


def contribution_name(work: str, round: int, masked: bool) -> int | str:
    """What the works of one contribution have in common: the attempts of a secure sum have the round."""
    return round if masked else work


def _refused(rule: str, what: str) -> RefusedError:
    return RefusedError(f"policy-{rule}", f"The policy of the site does not allow {what}.")


def _cohort(plan: Plan, clients: int) -> int:
    """The expected number of clients of a round; 0 if the sampler does not state it."""
    sampler: Any = plan.sampler
    if isinstance(sampler, Everyone):
        return clients
    if hasattr(sampler, "n"):
        return min(int(sampler.n), clients)
    return round(sampler.q * clients) if hasattr(sampler, "q") else 0


def is_approved(home: Path, run: str, work: Work) -> bool:
    """Whether a person has approved the plan of a work. If not, the plan is noted for `atoll approve`.

    An evaluation needs the approval of any plan of the run. A plan that waits is not replaced: the server could change
    it after a person has read it.
    """
    name = digest(work.plan.encode()).hex()
    known = _approvals(home)
    if [run, name] in known or (work.kind != "round" and any(one == run for one, _ in known)):
        return True
    if _asked(home) is None:
        asked = {"run": run, "plan": work.plan, "hash": name}
        atomic_write(home / _ASKED, json.dumps(asked, indent=1).encode(), 0o600)
    return False


def approve_plan(home: Path) -> dict[str, Any]:
    """Approve the plan that waits at a site.

    Returns:
        The run and the text of the plan.
    Raises:
        UsageError: no plan waits.
    """
    asked = _asked(home)
    if asked is None:
        raise UsageError(f"No plan waits at {home}.", "a site whose policy has ask = true, and a run.")
    names = [*_approvals(home), [asked["run"], asked["hash"]]]
    atomic_write(home / _APPROVED, json.dumps(names).encode(), 0o600)
    (home / _ASKED).unlink()
    return {"run": asked["run"], "plan": asked["plan"]}


def _asked(home: Path) -> dict[str, Any] | None:
    path = home / _ASKED
    return json.loads(path.read_bytes()) if path.exists() else None


def _approvals(home: Path) -> list[list[str]]:
    path = home / _APPROVED
    return json.loads(path.read_bytes()) if path.exists() else []
