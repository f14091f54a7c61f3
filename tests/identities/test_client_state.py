"""Client state: rows are stored and read without a copy only if this changes no number and takes no more memory."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classification, run, seeded, task_of
from torch import nn

from atoll.compute.buffer_pool import BufferPool, use_pool
from atoll.compute.compiled import attach
from atoll.compute.model_state import some
from atoll.compute.tensor_notes import BLOCK, blocks, lookup
from atoll.engine.client_state import Memory, Uncommitted
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.local import Dynamic, Normalised, Proximal, Scaffold, Train
from atoll.plan.local.correction import Chained
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.round import read_only_memory

D = 5
PUTS = st.lists(
    st.tuples(st.lists(st.integers(0, 5), min_size=1, unique=True), st.sampled_from(["", "a", "b", "a and b"])),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(PUTS)
def test_every_row_is_that_of_its_last_write(puts):
    memory, want = Memory({"a/x": torch.zeros(D), "b/x": torch.zeros(())}), {}
    for number, (clients, owned) in enumerate(puts):
        ids, values = torch.tensor(clients), 10.0 * number + torch.arange(1.0, len(clients) + 1)
        rows = {"a/x": values[:, None].repeat(1, D), "b/x": values.clone()}
        memory.put(ids, rows, {"a and b": ""}.get(owned, f"{owned}/") if owned else "")
        if not owned:  # the caller may use its tensors again
            for t in rows.values():
                t.fill_(-1)
        want |= dict(zip(clients, values.tolist(), strict=True))
        for read_only in ("", "a/", "b/"):
            got = memory.take(torch.arange(6), read_only)
            for name, t in got.items():
                assert t.reshape(6, -1)[:, 0].tolist() == [want.get(i, 0.0) for i in range(6)], name
        assert not memory.first["a/x"].any()
    kept = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for row in memory._rows.values()
        for t in row.values()
    }
    assert sum(kept.values()) <= 1.25 * len(want) * (D + 1) * 4


def rows(*values):
    return {"v": torch.tensor(values)[:, None].repeat(1, D)}


def test_rows_that_are_adjacent_are_read_where_they_are():
    memory, given = Memory({"v": torch.zeros(D)}), rows(1.0, 2.0, 3.0)
    ids = torch.tensor([4, 7, 5])
    memory.put(ids, given, "v")
    assert memory.take(ids, "v")["v"].data_ptr() == given["v"].data_ptr()
    assert memory.take(ids[1:], "v")["v"].data_ptr() == given["v"][1].data_ptr()
    copies = memory.take(ids), {"v": memory.take(ids.flip(0), "v")["v"].flip(0)}, memory.changed()[1]
    for copy in (*copies[:2], {"v": copies[2]["v"][[0, 2, 1]]}):
        assert copy["v"].equal(given["v"]) and copy["v"].data_ptr() != given["v"].data_ptr()
    pending = Uncommitted(memory)
    pending.put(ids[:1], rows(9.0))
    pending.take(ids, "v")
    assert memory.take(ids)["v"].equal(given["v"])  # the rows of the store do not change before the round is accepted


def test_a_client_that_has_not_been_written_never_shares_the_first_state():
    memory, one = Memory({"v": torch.zeros(D)}), torch.tensor([3])
    read = memory.take(one, "v")
    memory.put(one, read, "v")
    memory.put(one, rows(5.0))
    assert not memory.take(torch.tensor([4]))["v"].any()


def test_a_tensor_with_much_more_memory_is_copied():
    memory, large = Memory({"v": torch.zeros(D)}), torch.ones(100, D)
    memory.put(torch.tensor([1, 2]), {"v": large[:2]}, "v")
    large.fill_(7)
    assert memory.take(torch.tensor([1, 2]))["v"].equal(torch.ones(2, D))


@dataclass(frozen=True, repr=False)
class Foreign(Scaffold):
    """A part from outside of the package."""


def test_only_corrections_of_the_package_share_memory():
    def prefix(correction):
        return read_only_memory(Plan(Train(sgd(0.1), epochs=1, batch=3, correction=correction), Mean()))

    assert prefix(Scaffold()) == prefix(Dynamic(0.1)) == "local/correction."
    assert prefix(Chained((Proximal(0.1), Normalised()))) == "local/correction."
    assert prefix(None) == prefix(Foreign()) == ""


@pytest.mark.parametrize("cohort", [None, 3])
def test_shared_memory_changes_no_bit(cohort):
    """Chunks of two clients, and cohorts that change, so that groups of rows are split."""
    data = classification((7, 5, 5, 5, 2), (1, 6, 6))

    def found(correction):
        task = task_of(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))), data, "fused", torch.float32)
        plan = Plan(Train(sgd(0.1), epochs=1, batch=3, correction=correction), Mean(), cohort=cohort)
        with use_pool(BufferPool()):
            state = run(plan, InProcessEngine(task, data, chunk=2), rounds=5)[0]
        return state.model.theta, state.memory.take(torch.arange(5))["local/correction.control"]

    assert all(map(torch.equal, found(Scaffold()), found(Foreign())))


@pytest.mark.parametrize("end", [3, BLOCK, BLOCK + 9, 2 * BLOCK])
def test_a_part_of_a_vector_keeps_the_peaks_of_its_blocks(end):
    x = torch.randn(3, 2 * BLOCK + 5, generator=torch.Generator().manual_seed(1))
    attach(x, "peaks", torch.stack([block.abs().amax(1) for block in x.split(BLOCK, 1)], 1))
    part = some(x, (slice(0, end),))
    peaks = lookup(part, "peaks")
    assert part.equal(x[:, :end]) and peaks.shape == (3, blocks(end))
    assert peaks.equal(torch.stack([block.abs().amax(1) for block in part.split(BLOCK, 1)], 1))
    assert lookup(some(x, (slice(1, end),)), "peaks") is None
