"""The embedded models, the scenes they were trained on, and their training."""
