"""Where clients run."""

ENGINES = ("inprocess", "torchrun")
