#!/usr/bin/env bash
# Keys and signed permissions of the enclaves in policy.xml: make_keys.sh KEYSTORE [POLICY]. Statically checked,
# not run.
#
#   deploy/sros2/make_keys.sh ~/keystore
#   export ROS_SECURITY_KEYSTORE=~/keystore ROS_SECURITY_ENABLE=true ROS_SECURITY_STRATEGY=Enforce
#   ros2 run flashrt_ros policy_node --ros-args --enclave /flashrt/policy_node ...
#
# Running it again keeps the authority and the keys and signs the permissions anew. Needs ros-jazzy-sros2.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: $0 KEYSTORE [POLICY]" >&2; exit 2; }
keystore=$1
policy=${2:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/policy.xml}
command -v ros2 > /dev/null || { echo "make_keys: no ros2: source ROS 2 first" >&2; exit 2; }
ros2 security --help > /dev/null 2>&1 || { echo "make_keys: apt install ros-jazzy-sros2" >&2; exit 2; }
[ -r "$policy" ] || { echo "make_keys: $policy: no such policy file" >&2; exit 2; }

umask 077
[ -f "$keystore/public/ca.cert.pem" ] || ros2 security create_keystore "$keystore"
enclaves=$(python3 - "$policy" <<'PY'
import sys
import xml.etree.ElementTree as tree

for enclave in tree.parse(sys.argv[1]).getroot().iter("enclave"):
    print(enclave.attrib["path"])
PY
)
for enclave in $enclaves; do
    [ -f "$keystore/enclaves$enclave/key.pem" ] || ros2 security create_enclave "$keystore" "$enclave"
    ros2 security create_permission "$keystore" "$enclave" "$policy"
    echo "$enclave: keys and permissions in $keystore/enclaves$enclave"
done
echo "keep $keystore/private on a machine that is not the robot: it signs permissions"
