"""The verbs, one file each, as ``headstart.VERB`` in Python and ``headstart VERB`` in the shell.

They live one level down so that ``headstart.pretrain`` is always the function, never the module of that name.
"""
