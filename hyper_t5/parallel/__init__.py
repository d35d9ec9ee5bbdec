"""Devices and processes: meshes, shardings, the distributed runtime, accelerators."""
