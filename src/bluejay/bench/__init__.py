"""What a machine makes of a network: measured, and held against what its memory allows."""
