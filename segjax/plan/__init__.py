"""Plans a job for devices that are not available: memory, time, and changes that make it fit."""
