"""Measure the time and memory of recipes, alone or compared with a peer, and write the benchmark page."""
