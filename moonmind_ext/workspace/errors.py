"""What can be wrong with a workspace."""


class WorkspaceError(Exception):
    """The workspace cannot be read; the message names the path."""
