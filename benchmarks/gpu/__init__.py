"""First contact with a GPU: `python -m benchmarks.gpu --out FOLDER` checks and measures for at most 520 seconds."""
