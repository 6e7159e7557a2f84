"""Start the policy node with a Pi0 checkpoint.

    ros2 launch flashrt_ros pi0.launch.py checkpoint:=DIR robot:=NAME
"""

from launch import LaunchDescription

from flashrt_ros import bringup, launch_translation


def generate_launch_description() -> LaunchDescription:
    return launch_translation.describe(bringup.PI0_ARGUMENTS, bringup.pi0_nodes)
