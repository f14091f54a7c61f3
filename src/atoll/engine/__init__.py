"""Where clients run."""

ENGINES = ("inprocess", "processes", "torchrun", "ray")
