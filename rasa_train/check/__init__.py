"""The description of a run before it starts: parameters, steps, memory, time."""
