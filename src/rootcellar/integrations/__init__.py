"""The engine in the places that other people's programs keep for one. Each is imported by name, and needs its extra."""
