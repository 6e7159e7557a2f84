"""Benchmarks; run them from the root of a source checkout: python -m benchmarks.bench_policy."""
