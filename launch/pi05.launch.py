"""Start the policy node with a Pi0.5 checkpoint.

    ros2 launch flashrt_ros pi05.launch.py checkpoint:=DIR robot:=NAME
"""

from launch import LaunchDescription

from flashrt_ros import bringup, launch_translation


def generate_launch_description() -> LaunchDescription:
    return launch_translation.describe(bringup.PI05_ARGUMENTS, bringup.pi05_nodes)
