"""Renamed parts: a plan text with an old name is refused with the new text; run folders of before are still read."""

import shutil
from pathlib import Path

import pytest

from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.plan.registry import PARTS, read_part, renamed
from atoll.training.experiment import Experiment

BEFORE = Path(__file__).parents[1] / "golden" / "run_before"
TEXTS = [
    ("Feedback(TopK(0.01))", "ErrorFeedback(TopK(0.01))"),
    ("Feedback(TopK(0.01) >> Quantize(8))", "ErrorFeedback(TopK(0.01) >> Quantize(8))"),
    ("Shift(TopK(0.1)) >> Quantize(8)", "EF21(TopK(0.1)) >> Quantize(8)"),
    ("Buffered(10, staleness=polynomial(1.0))", "Buffered(10, staleness=staleness_polynomial(1.0))"),
    ("Buffered(10, polynomial(power=0))", "Buffered(10, staleness_polynomial(power=0))"),
]


@pytest.mark.parametrize(("old", "new"), TEXTS)
def test_an_old_name_is_refused_with_the_new_text(old, new):
    with pytest.raises(UsageError) as caught:
        read_part(old)
    assert caught.value.line == new and new in caught.value.required
    assert repr(read_part(new)) == repr(read_part(renamed(old)))
    slot = "pace" if old.startswith("Buffered") else "codec"
    with pytest.raises(UsageError) as caught:
        Experiment().with_settings({f"plan.{slot}": old}).plan()
    assert caught.value.line == f"{slot}={new}"


@pytest.mark.parametrize(
    "text",
    [
        "ErrorFeedback(TopK(0.1))",
        "sgd(polynomial(0.1, rounds=9))",
        "sgd(polynomial(lr=0.1, rounds=9, power=2))",
        "Buffered(2, staleness_polynomial(0.5))",
    ],
)
def test_present_names_stay(text):
    assert renamed(text) == text and renamed(repr(read_part(text))) == repr(read_part(text))
    assert not {"Feedback", "Shift"} & set(PARTS)


def test_a_folder_of_before_is_read_and_not_resumed(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(
        'recipe = "fedbuff(0.1, staleness=polynomial(0.25))"\n\n[plan]\ncodec = "Feedback(TopK(0.1))"\n',
        encoding="utf-8",
    )
    read = Experiment.read(file, old_names=True).plan()
    assert repr(read.codec) == "ErrorFeedback(TopK(0.1))" and read.pace.staleness(3) == 4**-0.25
    with pytest.raises(UsageError, match="staleness_polynomial"):
        Experiment.read(file).plan()


def test_a_run_of_before_resumes_after_its_file_has_the_new_name(tmp_path, capsys):
    run = Path(shutil.copytree(BEFORE, tmp_path / "run_before"))
    words = ["resume", str(run), "--rounds", "4", "--any-version"]
    assert main(words) == 2
    assert "ErrorFeedback(TopK(0.05))" in capsys.readouterr().err
    config = run / "config.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"Feedback(TopK(0.05))"', '"ErrorFeedback(TopK(0.05))"'), encoding="utf-8")
    assert main(words) == 0
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 4
