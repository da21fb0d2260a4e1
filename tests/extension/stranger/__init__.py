"""Stands for an outside package: nothing here edits or patches Boxwright."""
