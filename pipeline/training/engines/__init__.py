"""What the loop knows of how a model is held: plain PyTorch, DeepSpeed, sharding, scales."""
