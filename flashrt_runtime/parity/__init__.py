"""Parity work: a reference implementation in float64, and drift reports against independent code."""
