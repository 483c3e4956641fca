"""What stands between a network and the range coder: rounding, densities, exact layers, the coding walk.

No particular model lives here. A float layer and its integer twin share a file.
"""
