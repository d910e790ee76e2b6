"""Networks: pure functions apply(params, x, t, d, labels)."""
