"""What every store has to keep to, as tests: ``pytest --rootcellar-store module:Class`` runs them against one's own."""
