"""Start the worker processes of a run, and watch over them."""
