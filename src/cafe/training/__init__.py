"""Examples -> a checkpoint: the recipe, and the loop that follows it."""
