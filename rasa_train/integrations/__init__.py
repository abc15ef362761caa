"""Plug-ins for other libraries."""
