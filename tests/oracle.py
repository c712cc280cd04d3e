"""The slow loops that the shipped arrays are held against; see `segjax.rl.oracle`."""

from segjax.rl.oracle import *  # noqa: F403
