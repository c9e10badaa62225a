"""Training: tokenise, pack, step, save, on one device."""
