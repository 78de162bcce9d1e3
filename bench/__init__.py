"""Benchmarks: speed on a GPU, fidelity on data we can make ourselves."""
