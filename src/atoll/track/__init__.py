"""Trackers: MLflow, TensorBoard and Weights & Biases receive the rounds and the files of a run.

    atoll.train(..., observers=[atoll.track.MLflow()])
    atoll run --track mlflow
    atoll track RUN --to tensorboard

Each works without a network by default. A tracker reads the run folder only, so it receives no value that the folder
lacks, and it cannot change a training. Its package is imported at the first use.

Tests: tests/surface/test_track.py
"""

from atoll.track.mlflow import MLflow
from atoll.track.tensorboard import TensorBoard
from atoll.track.tracking import Rows, RunFiles, Session, Tracker, Tracking, send_run, tracker
from atoll.track.wandb import WandB

__all__ = [
    "MLflow",
    "Rows",
    "RunFiles",
    "Session",
    "TensorBoard",
    "Tracker",
    "Tracking",
    "WandB",
    "send_run",
    "tracker",
]
