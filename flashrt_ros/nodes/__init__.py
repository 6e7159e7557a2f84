"""Lifecycle nodes: thin layers over `flashrt_ros.core` and `flashrt_runtime`."""
