"""A sandbox of Linux namespaces for code that nobody has read, and for Jupyter notebooks in particular.

Knows Linux and Jupyter kernels; refuses to know nbgrader, courses, HTTP and databases. Start reading at
`isolate.sandbox`, whose docstring is the theory of operation.
"""
