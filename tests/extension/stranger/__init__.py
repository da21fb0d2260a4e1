"""What an outside package would hold: nothing here edits or patches Boxwright."""
