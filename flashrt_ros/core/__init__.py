"""The robot side without ROS: contract, synchroniser, ingest, timeline, limits, threads, metrics.

No module here imports rclpy or torch; messages are duck-typed (attributes only). Times are int nanoseconds.
"""
