"""The private names of MiniStack that this package replaces.

They may change with any version: one that is gone is an error when the server starts, and one that no longer means
what it did fails a test in tests/test_local_aws.py.
"""


def replace(owner, **names):
    """Replaces names of a module or class, or keys of a dictionary, all of which must be there already."""
    is_dictionary = isinstance(owner, dict)
    for name, new in names.items():
        if not (name in owner if is_dictionary else hasattr(owner, name)):
            raise RuntimeError(f"this version of MiniStack has no {name} in {getattr(owner, '__name__', 'its table')}")
        if is_dictionary:
            owner[name] = new
        else:
            setattr(owner, name, new)
