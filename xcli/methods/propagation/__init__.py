"""Methods that send relevance, excitation or multipliers back through a network instead of the gradient."""
