"""Weights in other formats: each module has a table of names, and reads or writes one format."""
