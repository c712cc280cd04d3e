"""What a job needs on devices that need not be there: memory, time, and what makes it fit."""
