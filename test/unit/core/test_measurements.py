"""Seams as commands show them."""

import numpy as np
import pytest

from flashrt_ros.core.measurements import Measurements, SeamMeter


def test_a_seam_is_measured_where_the_chunk_changes_and_nowhere_else() -> None:
    measured = Measurements()
    meter = SeamMeter(measured, 20_000_000)
    for sequence, position in ((1, 0.0), (1, 0.01), (1, 0.02), (2, 0.05), (2, 0.06)):
        meter.add(sequence, np.array([position, -position]))
    assert measured.seam_position.samples().tolist() == pytest.approx([0.03])
    # From 0.01 to 0.03 rad a tick of 20 ms.
    assert measured.seam_velocity.samples().tolist() == pytest.approx([1.0])


def test_nothing_is_measured_across_a_reset() -> None:
    measured = Measurements()
    meter = SeamMeter(measured, 20_000_000)
    meter.add(1, np.zeros(2))
    meter.reset()
    meter.add(2, np.ones(2))
    meter.add(2, np.ones(2))
    assert measured.seam_position.total == 0


def test_clear_forgets_samples_and_keeps_counts() -> None:
    measured = Measurements()
    for window in measured.windows().values():
        window.add(1.0)
    measured.dropped[1] += 1  # type: ignore[index]
    measured.clear()
    assert all(window.total == 0 for window in measured.windows().values())
    assert measured.dropped.total() == 1
