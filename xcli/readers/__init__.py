"""Where annotations come from: one file a format. What they share is in ``grid`` and ``matching``."""
