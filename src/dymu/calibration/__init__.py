"""Sample images and videos -> Thresholds."""
