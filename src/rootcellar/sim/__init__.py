"""The simulator: real traces through the real cache, without the bytes."""
