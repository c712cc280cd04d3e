"""The slow loops that the shipped arrays are held against; see `segjax.oracle`."""

from segjax.oracle import *  # noqa: F403
