"""Say what a run would be before it starts: parameters, steps, memory, time."""
