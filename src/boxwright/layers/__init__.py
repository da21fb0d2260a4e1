"""Layers that detectors share, and their fast computation on a CPU."""
