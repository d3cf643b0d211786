"""nbgrader, safe: student notebooks run in a sandbox behind the same commands and the same buttons.

In a course's nbgrader_config.py, after all its other settings:

    import nbgrader_aalto
    nbgrader_aalto.configure(c)

Knows nbgrader and uses `isolate`; refuses to know how a sandbox is built.
"""

from nbgrader_aalto.configure import configure

__all__ = ["configure"]
