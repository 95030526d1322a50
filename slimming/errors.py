"""What a person can put right, said in one line. `slimming.cli.entry.run` prints it and exits."""


class UserError(Exception):
    """Wrong flags, files or data. The message says what is wrong and what to do: exit status 2."""

    status = 2


class Diverged(UserError):
    """The loss is no longer finite: exit status 1."""

    status = 1


class Interrupted(UserError):
    """Ctrl-C; the message says how to go on: exit status 130."""

    status = 130
