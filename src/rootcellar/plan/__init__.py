"""How a budget of bytes becomes pages: what a model costs, what fits a device. Engine and planner both ask here."""
