# flashrt_ros on x86-64 with an NVIDIA GPU: Ubuntu 24.04, ROS 2 Jazzy, CUDA 13. Statically checked, not run.
#
#   docker build -f deploy/docker/x86.Dockerfile -t flashrt:x86 .
#   docker run --rm --gpus all flashrt:x86                             # flashrt doctor
#   docker run --rm --gpus all --network host --ipc host -v "$PWD/ckpt:/ckpt:ro" flashrt:x86 \
#       ros2 launch flashrt_ros pi05.launch.py checkpoint:=/ckpt robot:=NAME prompt:='pick up the block'
#
# CUDA_ARCHS: GPUs the kernels are built for; the default is Ada, Hopper and consumer Blackwell.
# TORCH_INDEX_URL: another index for torch alone.
ARG CUDA_ARCHS="89;90a;120a"

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS cuda
FROM ros:jazzy-ros-base-noble AS ros

# The sources, and what they need at run time; nothing of the tests.
FROM ros AS base
ARG TORCH_INDEX_URL=""
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# apt's versions follow the base image's release
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        python3-venv ros-jazzy-cv-bridge ros-jazzy-diagnostic-msgs ros-jazzy-launch-ros \
        ros-jazzy-rmw-cyclonedds-cpp ros-jazzy-rosbag2-py ros-jazzy-rosbag2-storage-mcap ros-jazzy-sros2 \
        ros-jazzy-trajectory-msgs \
    && rm -rf /var/lib/apt/lists/*
COPY scripts/requirements /opt/flashrt/requirements
ENV PIP_CONSTRAINT=/opt/flashrt/requirements/constraints-installed-ros.txt
RUN python3 -m venv --system-site-packages /opt/flashrt/venv \
    && /opt/flashrt/venv/bin/pip install -r /opt/flashrt/requirements/torch.txt \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
    && /opt/flashrt/venv/bin/pip install -r /opt/flashrt/requirements/runtime.txt

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && /opt/flashrt/venv/bin/pip install -r /opt/flashrt/requirements/build.txt
COPY --from=cuda /usr/local/cuda /usr/local/cuda
ARG CUDA_ARCHS
COPY . /opt/flashrt/src
WORKDIR /opt/flashrt/src
RUN export PATH="/opt/flashrt/venv/bin:/usr/local/cuda/bin:$PATH" VIRTUAL_ENV=/opt/flashrt/venv \
    && set +u && . /opt/ros/jazzy/setup.bash && set -u \
    && colcon build --base-paths . --install-base /opt/flashrt/install --build-base /tmp/build \
        --cmake-args -DCMAKE_BUILD_TYPE=Release -DPython3_EXECUTABLE=/opt/flashrt/venv/bin/python \
        -DFLASHRT_KERNELS=ON "-DFLASHRT_CUDA_ARCHS=${CUDA_ARCHS}" \
    && FLASHRT_BUILD_KERNELS=0 pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheel .

FROM base AS run
COPY --from=build /opt/flashrt/install /opt/flashrt/install
COPY --from=build /tmp/wheel /tmp/wheel
COPY deploy/docker/entrypoint.sh /opt/flashrt/entrypoint.sh
# the flashrt command; its modules are those of install/, which have the kernels
RUN /opt/flashrt/venv/bin/pip install --no-deps /tmp/wheel/*.whl \
    && useradd --create-home --uid 1500 robot \
    && mkdir -p /var/cache/flashrt && chown robot /var/cache/flashrt
# RMW of the robot: its profile for images is chosen by the entry point
ENV FLASHRT_CACHE_DIR=/var/cache/flashrt \
    RMW_IMPLEMENTATION=rmw_fastrtps_cpp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
USER 1500
WORKDIR /home/robot
VOLUME /var/cache/flashrt
ENTRYPOINT ["/opt/flashrt/entrypoint.sh"]
CMD ["flashrt", "doctor"]
