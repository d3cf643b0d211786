"""Attacks on the sandbox, each judged from outside. THREATS rows are named by the marker `threat`."""
