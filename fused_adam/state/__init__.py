"""Optimizer state: flat memory, and how it is saved, loaded, converted and offloaded."""
