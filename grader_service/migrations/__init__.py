"""How the tables became what they are: Alembic's environment, and one file in `versions` for each change.

A packaged file, so that `grader-service db upgrade` works wherever the service is installed. A new change is a new
file beside the last one; the tests hold the outcome of all of them and `models` equal.
"""
