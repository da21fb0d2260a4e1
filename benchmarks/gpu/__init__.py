"""What must hold and what it costs on one GPU: `python -m benchmarks.gpu --out FOLDER`, under ten minutes."""
