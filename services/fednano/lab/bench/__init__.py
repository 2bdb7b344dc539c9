"""`fednano bench`: what is claimed of speed and memory, measured as ratios side by side in one run."""
