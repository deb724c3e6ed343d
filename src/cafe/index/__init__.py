"""Use a checkpoint on images of one's own: index a folder, search it, ask it."""
