"""Samples -> Thresholds."""

from dymu.calibrate.edges import NEVER, threshold_for
from dymu.calibrate.images import calibrate
from dymu.calibrate.samples import ImageSource
from dymu.calibrate.videos import calibrate_videos

__all__ = ["NEVER", "ImageSource", "calibrate", "calibrate_videos", "threshold_for"]
