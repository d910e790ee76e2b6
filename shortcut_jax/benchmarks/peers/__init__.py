"""Programs that do the same work with other libraries, in an environment of their own.

Nothing here is imported by shortcut_jax, and nothing here imports it: `benchmarks/peer.py` starts
the files as scripts.
"""
