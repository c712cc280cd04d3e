"""The class of errors that a user can fix; the message gives the key or file, and the fix."""


class UserError(ValueError):
  """Wrong input. The command line prints its message alone; other errors are defects of segjax."""
