"""The state of a served run on disk: the bytes of its tensors, and one copy of a model that is the latest and best."""

import json

import pytest
import torch
from safetensors.torch import save

from atoll.net.rounds import RoundStore
from atoll.net.store import SMALL_STATE, Database
from atoll.net.tensors import tensor_bytes, tensor_parts
from atoll.runs.folder import Checkpoint

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32,
    torch.uint32, torch.float32, torch.float64, torch.int64, torch.uint64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


def test_the_bytes_are_those_of_safetensors():
    tensors = {f"t{n}": torch.zeros(3, n, dtype=dtype) for n, dtype in enumerate(DTYPES)}
    tensors |= {'é"\n\x01\u2028/\\😀': torch.tensor(2.0), "strided": torch.arange(12.0).reshape(3, 4).T}
    shared = torch.arange(6.0)
    tensors |= {"whole": shared, "part": shared[2:4], "grad": torch.ones(2, requires_grad=True)}
    assert tensor_bytes(tensors) == save({n: t.detach().clone().contiguous() for n, t in tensors.items()})
    assert tensor_bytes({}) == save({})


def test_the_parts_share_the_memory_of_the_tensors():
    weights = torch.zeros(4)
    parts = tensor_parts({"w": weights})
    weights[0] = 1
    assert bytes(parts[1]) == bytes(memoryview(weights.numpy()).cast("B"))


def model(value, numbers):
    return {"model/theta": torch.full((numbers,), float(value)), "model/buffers": torch.zeros(0)}


def commit(store, round, state, best=None):
    facts = {"round": round + 1}
    lines = {"metrics.jsonl": json.dumps({"round": round}).encode() + b"\n", "events.jsonl": b'{"event": "note"}\n'}
    store.save(Checkpoint({**state, "air/counts": torch.tensor([round])}, (), best, facts), lines)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@pytest.mark.parametrize("numbers", [4, SMALL_STATE // 4])
def test_a_model_that_is_the_latest_and_the_best_is_written_once(tmp_path, numbers):
    first, second, third = (model(value, numbers) for value in (1, 2, 3))
    written = []
    with Database.create(tmp_path, "hospitals", bytes(32)) as db:
        put = db.put_blob
        db.put_blob = lambda parts: written.append(len(parts)) or put(parts)

        def opened():
            return RoundStore(db, lambda: "run", lambda: (), False)

        store = opened()
        commit(store, 0, first, first)
        commit(store, 1, second, second)
        assert same(opened().load().best, second)
        commit(store, 2, third)  # the best model is that of the state before
        assert len(written) == (0 if numbers == 4 else 3)
        store = opened()
        found = store.load()
        assert same(found.best, second) and torch.equal(found.tensors["model/theta"], third["model/theta"])
        commit(store, 3, first)  # after a restart the best model is still known
        commit(store, 4, second)
        assert same(opened().load().best, second) and db.verify() == []
        commit(store, 5, third, third)
        commit(store, 6, third, third)
        assert same(opened().load().best, third) and len(list((tmp_path / "blobs").iterdir())) <= 2
        assert len(written) == (0 if numbers == 4 else 7), "one blob for each round"
        assert store.log("events.jsonl") == b'{"event": "note"}\n' * 7


def test_a_best_model_that_is_not_the_latest_has_a_blob_of_its_own(tmp_path):
    average, numbers = model(5, SMALL_STATE // 4), SMALL_STATE // 4
    with Database.create(tmp_path, "hospitals", bytes(32)) as db:
        store = RoundStore(db, lambda: "run", lambda: (), False)
        commit(store, 0, model(1, numbers), average)
        commit(store, 1, model(2, numbers))
        again = RoundStore(db, lambda: "run", lambda: (), False)
        assert same(again.load().best, average)
        commit(again, 2, model(3, numbers))
        assert same(again.load().best, average) and db.verify() == []
