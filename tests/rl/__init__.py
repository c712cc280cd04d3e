"""Tests of segjax.rl; a package so that its file names may recur in other folders."""
