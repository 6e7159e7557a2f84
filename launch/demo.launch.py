"""Start the simulated robot and the policy node that drives it.

    ros2 launch flashrt_ros demo.launch.py checkpoint:=DIR
"""

from launch import LaunchDescription

from flashrt_ros import bringup, launch_translation


def generate_launch_description() -> LaunchDescription:
    return launch_translation.describe(bringup.DEMO_ARGUMENTS, bringup.demo_nodes)
