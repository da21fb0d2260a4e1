"""Train, test, measure and publish object detectors on COCO-style data."""

__version__ = "0.1.0"
