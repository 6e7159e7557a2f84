"""Render one small image off-screen with the MUJOCO_GL in force; fail unless it shows what it should."""

import sys

import mujoco

SCENE = """
<mujoco>
  <visual><quality offsamples="0" shadowsize="0"/></visual>
  <worldbody>
    <light pos="0 0 3" castshadow="false"/>
    <geom type="box" size="0.2 0.2 0.2" rgba="1 0 0 1"/>
    <camera name="camera" pos="0 0 2"/>
  </worldbody>
</mujoco>
"""


def main() -> int:
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, height=64, width=64) as renderer:
        renderer.update_scene(data, "camera")
        image = renderer.render()
    red, green, blue = (int(channel) for channel in image[32, 32])
    if red < 100 + max(green, blue):
        print(f"expected a red box in the middle, got the pixel {(red, green, blue)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
