"""Class activation maps: a weighted sum of the channels of one layer."""
