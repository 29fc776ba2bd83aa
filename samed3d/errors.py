"""The one exception for what the user can mend. The command line prints it as one line and exits with code 2."""


class InputError(ValueError):
    """Bad input: the message is one line that names the argument, the rule, the value received and the remedy."""
