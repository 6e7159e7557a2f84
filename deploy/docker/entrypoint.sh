#!/usr/bin/env bash
# ROS, this workspace and the virtual environment, then the command; signals go to the command itself.
set -eo pipefail
. /opt/ros/jazzy/setup.bash
. /opt/flashrt/install/setup.bash
export PATH=/opt/flashrt/venv/bin:$PATH VIRTUAL_ENV=/opt/flashrt/venv
share=/opt/flashrt/install/flashrt_ros/share/flashrt_ros/config
# Raw camera images do not fit the default shared-memory segment; a profile named by the user wins.
case ${RMW_IMPLEMENTATION:-} in
    rmw_cyclonedds_cpp) export CYCLONEDDS_URI="${CYCLONEDDS_URI:-file://$share/cyclonedds_images.xml}" ;;
    *) export FASTRTPS_DEFAULT_PROFILES_FILE="${FASTRTPS_DEFAULT_PROFILES_FILE:-$share/fastdds_images.xml}" ;;
esac
exec "$@"
