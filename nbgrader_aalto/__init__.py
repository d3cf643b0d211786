"""nbgrader with every student notebook run in a sandbox."""
