"""Thin training loops on one shared base, their checkpoints and their monitor."""
