"""Values that more than one room speaks of: attention kinds' rule, tiers, keys."""
