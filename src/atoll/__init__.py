"""Gradient descent, distributed and federated learning as one formula, for PyTorch models."""
