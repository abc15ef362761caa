"""The methods, one per file. ``adapters.registry`` lists their names."""
