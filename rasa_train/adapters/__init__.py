"""The part that all methods share: the contract, and how adapters are placed, computed, saved and read."""
