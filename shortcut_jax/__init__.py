"""Shortcut models in JAX: one network that generates in 1, 2, 4 ... 128 steps."""
