"""What weight updates are like: reconstruction, spectra, subspaces. Pure tensor functions; plots beside them."""
