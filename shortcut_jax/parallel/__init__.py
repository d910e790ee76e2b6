"""Devices and processes: how arrays are laid out, and how processes agree, wait and leave."""
