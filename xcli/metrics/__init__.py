"""What a map is worth: one file a family, found by walking this package."""
