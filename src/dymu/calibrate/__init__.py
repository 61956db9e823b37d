"""Samples -> Thresholds."""

from dymu.calibrate.edges import NEVER, threshold_for
from dymu.calibrate.images import calibrate
from dymu.calibrate.samples import ImageSource

__all__ = ["NEVER", "ImageSource", "calibrate", "threshold_for"]
