"""A foreign engine, named `fake_engine:Fake()`: it trains in this process and writes down the calls that it gets."""

from dataclasses import dataclass

from atoll.base.grammar import Value
from atoll.engine import Engine, EngineSpec
from atoll.engine.inprocess import InProcessEngine

CALLS: list[object] = []


class FakeEngine(Engine):
    def open(self, task, data):
        CALLS.append("open")
        self.inner = InProcessEngine(task, data)
        self.population, self.layout = self.inner.population, self.inner.layout

    population = layout = None

    def gather(self, plan, state, cohort, key):
        return self.inner.gather(plan, state, cohort, key)

    def commit(self, round):
        CALLS.append(round)

    def describe(self):
        return {"planet": "Mars"}

    def close(self):
        CALLS.append("close")


@dataclass(frozen=True, repr=False)
class Fake(Value, EngineSpec):
    planets: int = 1

    def build(self, options):
        return FakeEngine()


@dataclass(frozen=True)
class Plain(EngineSpec):
    """Its `repr` is the one of a dataclass."""

    workers: int = 1

    def build(self, options):
        return FakeEngine()
