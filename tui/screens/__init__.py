"""Whole screens, made of widgets."""
