"""ROS 2 package that runs vision-language-action policies on the robot."""

from pkgutil import extend_path

__version__ = "0.1.0"

# With a source checkout before the installed package on sys.path (python -m ... in its root), the generated
# msg and srv are still found: they exist only in the installed package.
__path__ = extend_path(__path__, __name__)
