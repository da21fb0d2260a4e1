"""Layers that detectors share, and how a CPU computes them fast without changing what they mean."""
