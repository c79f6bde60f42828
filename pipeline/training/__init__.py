"""How a model is trained: the loop, the engines under it, checkpoints, telemetry."""
