"""Everything of the robot side that needs no ROS: contract, synchroniser, timeline, limits, threads, metrics.

No module here imports rclpy or torch; messages are duck-typed (attributes only). All times are int nanoseconds.
"""
