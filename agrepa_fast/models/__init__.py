"""Velocity models and their building blocks."""
