"""Start the policy node with a Pi0-FAST checkpoint.

    ros2 launch flashrt_ros pi0fast.launch.py checkpoint:=DIR robot:=NAME
"""

from launch import LaunchDescription

from flashrt_ros import bringup, launch_translation


def generate_launch_description() -> LaunchDescription:
    return launch_translation.describe(bringup.PI0FAST_ARGUMENTS, bringup.pi0fast_nodes)
