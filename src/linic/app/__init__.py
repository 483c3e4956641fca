"""Doors onto the codec: command line now; batch, web and compat later."""
