"""The configuration of the example course: nbgrader's own settings, then the sandbox in two lines."""

import os

from nbgrader.plugins import LateSubmissionPlugin

c = get_config()  # noqa: F821 - nbgrader defines it where it loads this file


class TenPercentLess(LateSubmissionPlugin):
    """What is handed in late loses a tenth of its points."""

    def late_submission_penalty(self, student_id: str, score: float, total_seconds_late: float) -> float:
        """The points to take away from a submission that came late."""
        return 0.1 * score


c.CourseDirectory.course_id = "pyscience"
c.Exchange.root = "/srv/nbgrader/exchange"
c.Execute.timeout = 60
c.AssignLatePenalties.plugin_class = TenPercentLess
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError()"}

# Grade with stock nbgrader for comparison: NBGRADER_AALTO_STOCK=1 nbgrader autograde ps1
# Do that only with notebooks whose authors you trust.
if not os.environ.get("NBGRADER_AALTO_STOCK"):
    import nbgrader_aalto

    nbgrader_aalto.configure(c)
