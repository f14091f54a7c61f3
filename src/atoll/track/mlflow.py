"""MLflow: runs in a SQLite file next to the run folders, or at a server. The model is a pyfunc of the predictor.

Tests: tests/surface/test_track.py
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.data.input import Input, NumberColumn, TextColumn
from atoll.runs.folder import library_versions
from atoll.track.tracking import Rows, RunFiles, refuse_missing

_STATUS = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MOST = 900  # metrics of one request; MLflow takes 1,000
_LONGEST = 6000  # characters of a parameter
# MLflow runs this file when it loads the model; no object is pickled.
_MODEL = """import mlflow

import atoll


class Model(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.predictor = atoll.predictor(context.artifacts["run"])

    def predict(self, context, model_input, params=None):
        return self.predictor.predict(model_input)


mlflow.models.set_model(Model())
"""
_OF_MODEL = ("config.toml", "input.json", "model.safetensors", "model.nonpersistent.safetensors", "environment.json")


@dataclass(frozen=True)
class MLflow:
    """Sends a run to MLflow. It needs the extra `atoll[mlflow]`.

    Args:
        uri: the tracking server or a file such as "sqlite:///runs.db"; None: MLFLOW_TRACKING_URI, else `mlflow.db` in
            the parent of the run folder.
        experiment: the name of the experiment.
        model: whether the model is sent as a pyfunc that takes raw rows.
        clients: whether values of single clients and the report are sent.
    Example:
        >>> MLflow(experiment="digits")
        MLflow(uri=None, experiment='digits', model=True, clients=False)
    """

    uri: str | None = None
    experiment: str = "atoll"
    model: bool = True
    clients: bool = False

    def check_tracker(self) -> None:
        """Refuse if MLflow is not installed."""
        refuse_missing("mlflow", "mlflow")

    def open_session(self, files: RunFiles, known: str | None, first: int) -> MLflowSession:
        """Open a run of MLflow, or continue the known one."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow would report its use to another host
        from mlflow import MlflowClient

        out = files.path.resolve().parent
        client = MlflowClient(self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out / 'mlflow.db'}")
        if known is not None:
            client.update_run(known, status="RUNNING")
            return MLflowSession(client, known, self.model)
        found = client.get_experiment_by_name(self.experiment)
        place = (out / "mlartifacts").as_uri() if client.tracking_uri.startswith("sqlite") else None
        home = client.create_experiment(self.experiment, place) if found is None else found.experiment_id
        tags = {"atoll.run": files.path.name, **{f"atoll.tag.{tag}": "true" for tag in files.tags}}
        run: str = client.create_run(home, tags=tags, run_name=files.title).info.run_id
        for name, value in files.parameters().items():
            client.log_param(run, valid_name(name), value[:_LONGEST])
        return MLflowSession(client, run, self.model)


class MLflowSession:
    """An open run of MLflow."""

    def __init__(self, client: Any, run: str, model: bool) -> None:
        self._client, self.id, self._model = client, run, model
        steps = [metric.step for metric in client.get_metric_history(run, "cohort")]  # a column of every row
        self.last: int | None = max(steps, default=-1)

    def log(self, rows: Rows) -> None:
        """Add rounds. A round is one request, so that a run killed in between has it or lacks it."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        for at, values in rows:
            metrics = [Metric(valid_name(name), value, now, at) for name, value in values.items()]
            # "cohort" is in the last request: a round counts as sent when all its values are.
            metrics.sort(key=lambda metric: metric.key == "cohort")
            for start in range(0, len(metrics), _MOST):
                self._client.log_batch(self.id, metrics[start : start + _MOST])
            self.last = at

    def close(self, status: str, files: RunFiles | None) -> None:
        """Send the files and the model, and end the run."""
        try:
            for file in [] if files is None else files.artifacts():
                self._client.log_artifact(self.id, str(file))
            if files is not None and self._model and predicts(files.path):
                with tempfile.TemporaryDirectory(prefix="atoll-mlflow-") as folder:
                    save_pyfunc(files.path, Path(folder) / "model")
                    self._client.log_artifacts(self.id, str(Path(folder) / "model"), "model")
        finally:
            self._client.set_terminated(self.id, _STATUS[status])


def valid_name(name: str) -> str:
    """A name without the characters that MLflow refuses.

    Example:
        >>> valid_name("plan.local"), valid_name("auc[a|b]")
        ('plan.local', 'auc_a_b_')
    """
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def predicts(path: Path) -> bool:
    """Whether the model of a run is a model of atoll, which is rebuilt from the files of the run folder."""
    files = RunFiles(path)
    model = files.parameters().get("model", "mlp")
    return ":" not in model and (path / "model.safetensors").is_file() and (path / "input.json").is_file()


def save_pyfunc(path: Path, folder: Path) -> None:
    """Write the model of a run in the format of MLflow. It takes raw rows, and answers as `atoll.predictor` does.

    Args:
        path: the run folder.
        folder: a new folder.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory(prefix="atoll-mlflow-") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice on an input example; the signature is given
        import mlflow.pyfunc

        code, run = Path(temporary) / "atoll_model.py", Path(temporary) / "run"
        code.write_text(_MODEL, encoding="utf-8")
        run.mkdir()
        for name in _OF_MODEL:
            if (path / name).is_file():
                (run / name).write_bytes((path / name).read_bytes())
        signature = _signature(Input.read(path))
        needed = [f"atoll=={library_versions().get('atoll', '0')}"]
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=str(code),
            artifacts={"run": str(run)},
            signature=signature,
            pip_requirements=needed,
        )


def _signature(found: Input) -> Any:
    """The columns of a raw row, or the shape of an array; the answer is a class name or a number."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    if found.columns:
        kinds = {NumberColumn: "double", TextColumn: "string"}
        each = [ColSpec(kinds.get(type(c), "string"), c.name, required=False) for c in found.columns]
        own = [] if found.by is None else [ColSpec("string", found.by, required=False)]
        return ModelSignature(Schema([*each, *own]))
    dtype = np.dtype("int64" if found.tokens is not None else found.dtype)
    return ModelSignature(Schema([TensorSpec(dtype, (-1, *found.features))]))
