"""Models: configs, parameters, loading and the dense decoder."""
