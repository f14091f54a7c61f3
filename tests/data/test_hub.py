"""Data sets of Hugging Face, outputs with logits, and models of transformers and PEFT. No hub is asked."""

import importlib.util
import os
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset as TorchDataset

import atoll
from atoll.base.errors import UsageError
from atoll.compute.outputs import logits_of
from atoll.data.hub import _next_tokens, hf, pad_lists

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
PLAN = "fedavg(lr=0.1, batch=8)"


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Net(nn.Module):
    """A model that answers in one of the forms of an output."""

    def __init__(self, form="tensor"):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.form = nn.Embedding(20, 4), nn.Linear(4, 2), form

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.to(self.head.weight.dtype)[..., None]
        logits = self.head((self.embed(input_ids) * mask).sum(-2) / mask.sum(-2))
        forms = {
            "tensor": lambda: logits,
            "object": lambda: Output(logits),
            "mapping": lambda: OrderedDict(loss=None, logits=logits),
            "tuple": lambda: (logits, None),
            "none": lambda: {"last_hidden_state": logits},
        }
        return forms[self.form]()


class Words(TorchDataset):
    """Rows that are dicts, with a class by their first token."""

    def __init__(self, rows=60, width=6):
        draw = np.random.default_rng(0)
        self.ids = draw.integers(1, 20, (rows, width))
        self.mask = np.ones_like(self.ids)
        self.y = (self.ids[:, 0] > 9).astype(np.int64)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        row = {"input_ids": torch.tensor(self.ids[i]), "attention_mask": torch.tensor(self.mask[i])}
        return row, torch.tensor(self.y[i])


def train(source, model, rounds=2, plan=PLAN, **more):
    data = source.split(clients=3, by=atoll.data.IID(), held_out=0.2)
    return atoll.train(model, data, plan, rounds=rounds, progress="none", **{"out": None, **more})


def prints(run):
    return [report.fingerprint for report in run.reports]


def test_outputs_with_logits_give_the_bits_of_a_tensor():
    words = Words()
    source = atoll.data.arrays({"input_ids": words.ids, "attention_mask": words.mask}, words.y)
    wanted = prints(train(source, Net(), rounds=1))
    for form in ("object", "mapping"):
        assert prints(train(source, Net(form), rounds=1)) == wanted, form
    for form, field in (("none", "['last_hidden_state']"), ("tuple", "[0]")):
        with pytest.raises(UsageError) as error:
            train(source, Net(form), rounds=1)
        names = {"torch": torch}
        exec(str(error.value.write.python if hasattr(error.value.write, "python") else error.value.write), names)
        assert field in error.value.given and prints(train(source, names["Logits"](Net(form)), rounds=1)) == wanted


def test_logits():
    t = torch.zeros(2, 3)
    for output in (t, {"logits": t}, Output(t)):
        assert logits_of(output) is t
    for output in (None, {}, (), (t, None), [t], (None, t), {"logits": None}):
        with pytest.raises(UsageError, match="The model returned"):
            logits_of(output)


def test_padding_and_next_tokens():
    assert pad_lists(np.arange(5), np.array([2, 0, 3]), 2, -1).tolist() == [[0, 1], [-1, -1], [2, 3]]
    assert pad_lists(np.zeros((0,), int), np.zeros((0,), int), 3, 0).shape == (0, 3)
    columns = {"input_ids": np.array([[4, 5, 0], [6, 7, 8]]), "attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    assert _next_tokens(columns).tolist() == [[5, -100, -100], [7, 8, -100]]


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets", reason="the extra atoll[hf] is not installed")


def made(datasets, words, **more):
    features = datasets.Features(
        input_ids=datasets.List(datasets.Value("int64")),
        attention_mask=datasets.List(datasets.Value("int64")),
        label=datasets.ClassLabel(names=["low", "high"]),
        **more,
    )
    rows = {"input_ids": words.ids.tolist(), "attention_mask": words.mask.tolist(), "label": words.y.tolist()}
    return datasets.Dataset.from_dict(rows | {n: [0] * len(words) for n in more}, features=features)


@pytest.mark.slow
def test_a_data_set_gives_the_bits_of_a_torch_data_set(datasets):
    words = Words()
    ds = made(datasets, words)
    source = hf(ds)
    assert source.classes == ("low", "high")
    assert prints(train(source, Net())) == prints(train(atoll.data.dataset(words), Net()))
    shuffled = hf(ds.shuffle(seed=1))  # rows by an index, not in the order of the table
    assert sorted(shuffled.rows.y.tolist()) == sorted(source.rows.y.tolist())
    both = hf(datasets.DatasetDict(train=ds.select(range(40)), test=ds.select(range(40, 60))))
    assert len(both.test) == 20 and len(both) == 40


@pytest.mark.slow
def test_unequal_rows_are_padded_to_one_width(datasets):
    rows = {"input_ids": [[1, 2, 3], [4, 7], [5, 6]], "label": [0, 1, 0]}
    ds = datasets.Dataset.from_dict(rows)
    with pytest.raises(UsageError, match="2 to 3 values"):
        hf(ds)
    source = hf(ds, pad={"input_ids": 0})
    assert source.features == hf(ds, pad={"input_ids": 0}, length=3).features
    assert [str(f) for f in source.rows.fields] == ["attention_mask int64 [3]", "input_ids int64 [3]"]
    cut = hf(ds, pad={"input_ids": 0}, length=2)
    assert str(cut.rows.fields[1]) == "input_ids int64 [2]"
    assert cut.notes == (*source.notes, "1 row of input_ids is longer than 2 and was cut.")
    tokens = hf(ds, y=None, x=["input_ids"], pad={"input_ids": 0}, task="tokens")
    assert tokens.rows.y.tolist() == [[2, 3, -100], [7, -100, -100], [6, -100, -100]]


@pytest.mark.slow
def test_refused_data_sets(datasets):
    ds = datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1.0, 2.0], "label": [0, 1]})
    for call, match in (
        (lambda: hf(ds, x="text"), "transform"),
        (lambda: hf(ds, x="m"), "'n'|called 'm'"),
        (lambda: hf(ds, y="labl"), "label"),
        (lambda: hf(ds.to_iterable_dataset()), "streamed"),
        (lambda: hf([1, 2]), "no datasets.Dataset"),
        (lambda: hf(datasets.DatasetDict(validation=ds)), "train"),
        (lambda: hf(ds.select_columns(["text", "label"])), "No column"),
        (lambda: hf(datasets.Dataset.from_dict({"n": [1.0, None], "label": [0, 1]})), "1 missing"),
        (
            lambda: hf(ds.cast_column("label", datasets.ClassLabel(names=["a", "b"])).map(lambda row: {"label": -1})),
            "-1",
        ),
    ):
        with pytest.raises(UsageError, match=match):
            call()


BODY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
HALF = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {  # class, its config, the layers that LoRA adapts, the kind of task of PEFT
    "BertForSequenceClassification": (
        ("BertConfig", {"vocab_size": 20, "max_position_embeddings": 8, "num_labels": 2, **BODY}),
        (["query", "value"], "SEQ_CLS"),
    ),
    "GPT2LMHeadModel": (("GPT2Config", {"vocab_size": 20, **HALF}), (["c_attn"], "CAUSAL_LM")),
    "LlamaForCausalLM": (
        ("LlamaConfig", {"vocab_size": 20, "max_position_embeddings": 8, **BODY}),
        (["q_proj", "v_proj"], "CAUSAL_LM"),
    ),
}


def sentences(datasets):
    """Rows of 4 to 6 tokens, in which each token decides the next one."""
    draw = np.random.default_rng(0)
    ids = (draw.integers(1, 20, 60)[:, None] + 3 * np.arange(6)) % 19 + 1
    rows = [row[:n].tolist() for row, n in zip(ids, draw.integers(4, 7, 60), strict=True)]
    ds = datasets.Dataset.from_dict({"input_ids": rows})
    return hf(ds, x=["input_ids"], y=None, task="tokens", pad={"input_ids": 0})


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:fan_in_fan_out")
def test_a_model_and_its_lora_train_and_only_trained_numbers_travel(family, datasets, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra atoll[hf] is not installed")
    peft = pytest.importorskip("peft", reason="the extra atoll[hf] is not installed")
    (config, values), (layers, task) = FAMILIES[family]

    def make():
        torch.manual_seed(0)
        return getattr(transformers, family)(getattr(transformers, config)(**values))

    source = sentences(datasets) if task == "CAUSAL_LM" else hf(made(datasets, Words()))
    lora = peft.get_peft_model(make(), peft.LoraConfig(r=4, target_modules=layers, task_type=task))
    for model, rate, out in ((make(), 0.1, None), (lora, 0.5, tmp_path)):
        run = train(source, model, rounds=6, plan=f"fedavg(lr={rate}, batch=8)", out=out, report=False)
        losses = [report.metrics["loss"] for report in run.reports]
        assert losses[-1] < losses[0] and type(run.model) is type(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert 4 * trained <= run.reports[-1].bytes_up / 3 <= 4 * trained + 200
    again = peft.PeftModel.from_pretrained(make(), run.path / "adapter")
    ids, mask = torch.tensor(Words().ids), torch.tensor(Words().mask)
    logits = [m.eval()(input_ids=ids, attention_mask=mask).logits for m in (run.model, again)]
    assert torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_lora_of_rank_4_sends_2178_of_88516_numbers(datasets, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra atoll[hf] is not installed")
    peft = pytest.importorskip("peft", reason="the extra atoll[hf] is not installed")
    body = BODY | {"hidden_size": 64, "intermediate_size": 128}
    config = transformers.BertConfig(vocab_size=200, max_position_embeddings=32, num_labels=2, **body)
    model = transformers.BertForSequenceClassification(config)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    assert sum(p.numel() for p in lora.parameters()) == 88_516
    run = train(hf(made(datasets, Words())), lora, rounds=1)
    header = 20 + 8 * 2 * 32  # position_ids and token_type_ids, two buffers of whole numbers, are part of it
    assert run.reports[0].bytes_up == 3 * (4 * 2178 + header)


@pytest.mark.slow
def test_a_model_without_a_name_or_a_trained_number_and_pictures_are_refused(datasets):
    class Unmasked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.EmbeddingBag(20, 2)

        def forward(self, input_ids):
            return self.embed(input_ids)

    frozen = Net()
    for parameter in frozen.parameters():
        parameter.requires_grad = False
    source = hf(made(datasets, Words()))
    with pytest.raises(UsageError, match="attention_mask"):
        train(source, Unmasked())
    with pytest.raises(UsageError, match="train"):
        train(source, frozen)
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    with pytest.raises(UsageError, match="transform"):
        hf(datasets.Dataset.from_dict({"image": [], "label": []}, features=features), x="image")


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as error:
        hf([1])
    assert error.value.write == "pip install 'atoll[hf]'"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
def test_the_programs_of_the_manual_run(datasets, tmp_path, monkeypatch):
    """The blocks of docs/hugging_face.md in order, with a small BERT, a GPT-2 and reviews on the disk."""
    transformers = pytest.importorskip("transformers", reason="the extra atoll[hf] is not installed")
    pytest.importorskip("peft", reason="the extra atoll[hf] is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(30))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    kept.save_pretrained("bert")
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=128, num_labels=2, **BODY)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    transformers.GPT2Config(vocab_size=len(words), **HALF | {"n_positions": 128}).save_pretrained("gpt2")
    draw = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in draw.integers(0, 30, n)) for n in draw.integers(4, 9, 120)]
    rows = {"text": texts, "label": [i % 2 for i in range(120)], "shop": [f"shop {i % 12}" for i in range(120)]}
    datasets.Dataset.from_dict(rows).save_to_disk("reviews")
    page = (Path(__file__).parents[2] / "docs" / "hugging_face.md").read_text()
    space: dict[str, object] = {}
    found = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    for block in found:
        exec(re.sub(r"rounds=\d+", "rounds=1, report=False", block), space)
    assert len(found) == 4 and space["run"].rounds == 1
    train(space["source"], space["model"], rounds=1)
