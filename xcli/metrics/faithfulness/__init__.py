"""Does the map say what the model depends on? What happens to the score when pixels are taken away."""
