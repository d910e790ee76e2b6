"""The evaluation binary: samples, what is measured of them, and what is written of it."""
