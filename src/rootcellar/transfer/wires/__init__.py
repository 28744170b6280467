"""Ways for bytes from one node to another, one file each."""
