"""One file a method, and nothing else. ``adapters.registry`` has their names."""
