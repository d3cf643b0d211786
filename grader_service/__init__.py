"""The grading service: queues and runs grading jobs for many courses.

Nothing is here yet but the name: this layer may import `isolate` and may not import `nbgrader_aalto`.
"""
