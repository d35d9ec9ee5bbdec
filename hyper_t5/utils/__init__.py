"""Helpers without knowledge of models: errors, files, overrides, plots, safetensors."""
