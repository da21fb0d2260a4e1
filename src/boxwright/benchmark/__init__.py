"""What a recipe costs in time and memory, alone or beside a peer, and the page of all that was measured."""
