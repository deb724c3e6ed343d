"""Plug-ins that let other people's evaluation programs run a checkpoint."""
