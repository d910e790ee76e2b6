"""The one exception that is meant for people."""


class UserError(Exception):
    """Something the user can fix: a config key, a file, a checkpoint, a combination of settings.

    The message is one sentence that names the key or file, what was found, what was expected and
    the fix. The entry points print it without a traceback and exit with status 2.
    """
