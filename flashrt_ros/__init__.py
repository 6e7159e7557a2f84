"""flashrt_ros: vision-language-action policies as a ROS 2 node."""

from pkgutil import extend_path

# With a source checkout before the installed package on sys.path (python -m ... in its root), the generated msg and
# srv are still found: they exist only in the installed package.
__path__ = extend_path(__path__, __name__)
