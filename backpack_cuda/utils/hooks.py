"""A hook for where none is wanted."""


def no_op(*args, **kwargs) -> None:
    """Takes anything and does nothing."""
