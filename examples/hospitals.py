"""Heart disease in four hospitals: from a raw CSV file to predictions, and each figure with its reference.

The example writes the four files of the UCI set as one table, with texts and missing cells, and puts some rows aside as
new patients. It trains logistic regression over the hospitals, and prints for each hospital the accuracy on its own
held-out rows, with a 95 % interval, next to three references:

    constant    the answer that is most frequent in the hospital's train rows
    local       the same training with the hospital's own rows only
    pooled      the same training with the rows of all hospitals in one place

    ATOLL_DATA=FOLDER python examples/hospitals.py --out hospitals

FOLDER contains heart.processed.cleveland.data and the files of hungarian, switzerland and va. The same in a shell, from
the folder `hospitals`:

    atoll run --data heart.csv --target diagnosis --by hospital --drop slope,vessels,thal --held-out "PerClient(0.34)" \
        --model logistic --recipe "fedavg(lr=0.05, batch=10)" --rounds 30 --baselines
    atoll predict latest new.csv --to predictions.csv --proba

Reference: Janosi, Steinbrunn, Pfisterer and Detrano, Heart Disease, UCI Machine Learning Repository, 1988.
"""

import argparse
import csv
import os
from pathlib import Path

import torch
from torch import nn

import atoll
from atoll.base.intervals import wilson
from atoll.data import Clients

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
COLUMNS = (
    *("age", "sex", "chest pain", "pressure", "cholesterol", "sugar", "ECG", "heart rate", "exercise pain"),
    *("depression", "slope", "vessels", "thal", "diagnosis"),
)
PAIN = {"1": "typical angina", "2": "atypical angina", "3": "other pain", "4": "no pain"}
ECG = {"0": "normal", "1": "ST-T wave", "2": "hypertrophy"}
NEW = 10  # every tenth patient is new
PLAN, ROUNDS = "fedavg(lr=0.05, batch=10)", 30


def patients(folder: Path) -> list[list[str]]:
    """Read the four files: the cells of each patient as texts, with the hospital."""
    rows = []
    for hospital in HOSPITALS:
        with open(folder / f"heart.processed.{hospital}.data", encoding="utf-8") as file:
            for cells in csv.reader(file):
                row = dict(zip(COLUMNS, cells, strict=True))
                for column, words in (("chest pain", PAIN), ("ECG", ECG)):
                    row[column] = words.get(row[column].removesuffix(".0"), row[column])
                row["diagnosis"] = "disease" if float(row["diagnosis"]) > 0 else "healthy"
                rows.append([*row.values(), hospital])
    return rows


def write(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[*COLUMNS, "hospital"], *rows])


def trained(data: Clients) -> nn.Module:
    """Train as the federated run does, with the rows of these clients, and return the model."""
    training = atoll.rounds("logistic", data, PLAN, rounds=ROUNDS, evaluate_every=0)
    for _ in training:
        pass
    return training.model


def table(data: Clients, federated: nn.Module) -> list[str]:
    """One line for each hospital: train rows, and the accuracy of each model on its own n held-out rows."""
    pooled = trained(data.pooled())
    lines = [f"{'hospital':12}{'train':>6}  {'federated':27}{'constant':>10}{'local':>8}{'pooled':>8}"]
    ends = data.held_offsets.tolist()
    for client, name in enumerate(data.names or ()):
        x, y = data.held_out.take(data.held_order[ends[client] : ends[client + 1]])
        labels = data.take(data.client_rows(client))[1]
        right = {"constant": y == labels.mode().values}
        for model, net in (("federated", federated), ("local", trained(data.only(name))), ("pooled", pooled)):
            with torch.no_grad():
                right[model] = (net(x.float())[:, 0] > 0) == y
        share = {model: float(hits.double().mean()) for model, hits in right.items()}
        federated_interval = str(wilson(float(right["federated"].sum()), len(y)))
        references = f"{share['constant']:10.3f}{share['local']:8.3f}{share['pooled']:8.3f}"
        lines.append(f"{name:12}{len(labels):6}  {federated_interval:27}{references}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Heart disease in four hospitals, from a CSV file to predictions.")
    parser.add_argument("--out", type=Path, default=Path("hospitals"), help="folder of the files and the run")
    out = parser.parse_args(arguments).out
    folder = Path(os.environ.get("ATOLL_DATA", "."))
    if not (folder / "heart.processed.va.data").is_file():
        parser.error(f"{folder} has no heart.processed.*.data: set ATOLL_DATA to the folder of these files")
    rows = patients(folder)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "heart.csv", [row for i, row in enumerate(rows) if i % NEW])
    write(out / "new.csv", rows[::NEW])

    options = {"target": "diagnosis", "by": "hospital", "drop": "slope,vessels,thal"}
    data = atoll.data.csv(out / "heart.csv", **options).split(held_out="PerClient(0.34)")
    run = atoll.train("logistic", data, PLAN, rounds=ROUNDS, out=out, baselines=True, report=False)
    print(*data.notes, "", *table(data, run.model), "", sep="\n")
    models = {"federated": run.metrics, "local": run.baselines["local"], "pooled": run.baselines["pooled"]}
    print("All held-out rows:", ", ".join(f"{name} {values['accuracy']:.3f}" for name, values in models.items()))

    predictor = atoll.predictor(run.path)
    _, *cells = csv.reader((out / "new.csv").read_text(encoding="utf-8").splitlines())
    columns = dict(zip((*COLUMNS, "hospital"), zip(*cells, strict=True), strict=True))
    scores = predictor.evaluate(columns, columns["diagnosis"], columns["hospital"])
    print(f"\n{scores.rows} new patients: accuracy {scores.metrics['accuracy']:.3f}, auc {scores.metrics['auc']:.3f}")
    for patient, answer in list(zip(cells, predictor.predict(columns).tolist(), strict=True))[::20]:
        print(f"{patient[-1]:12} age {patient[0]:5} {patient[2]:16} predicted {answer:8} diagnosed {patient[-2]}")


if __name__ == "__main__":
    main()
