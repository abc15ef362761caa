"""What all methods share: the contract, where adapters go, how they are computed, saved and read."""
