"""Errors that the user can fix. `slimming.cli.entry.run` prints them as one line and exits."""


class UserError(Exception):
    """Wrong flags, files or data. The message says what is wrong and what to do: exit status 2."""

    status = 2


class Diverged(UserError):
    """The loss is no longer finite: exit status 1."""

    status = 1


class Interrupted(UserError):
    """Ctrl-C; the message says how to continue: exit status 130."""

    status = 130
