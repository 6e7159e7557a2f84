"""ROS 2 package that runs vision-language-action policies on the robot."""

__version__ = "0.1.0"
