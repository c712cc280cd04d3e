"""The class of every error that a user can mend: its message names the key or file, and the fix."""


class UserError(ValueError):
  """Wrong input. The command line prints the message alone; any other error is a defect of
  segjax.
  """
