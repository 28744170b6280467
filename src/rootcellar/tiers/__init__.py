"""Bytes of pages on their way between tiers, and the stores beyond them. Import the module that you mean."""
