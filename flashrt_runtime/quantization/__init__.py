"""Precisions below 16 bits: a layer's Linear is swapped, the model stays."""
