"""Which output of a test cell decides over its points."""

from nbformat import NotebookNode

from isolate.outputs import error


def let_failures_decide(cell: NotebookNode) -> None:
    """Put errors and stderr before results in a test cell.

    nbgrader's `determine_grade` stops at the first result, so that one displayed by the tested code would
    otherwise decide over the assertion that fails after it. An honest cell has no result before its error, and one
    result at the most: the value of its last expression. Which of several is the instructor's cannot be told.
    """
    if cell.cell_type != "code" or not cell.metadata.get("nbgrader", {}).get("grade"):
        return
    results = [output for output in cell.outputs if output.output_type == "execute_result"]
    others = [output for output in cell.outputs if output.output_type != "execute_result"]
    if len(results) > 1:
        text = "This test cell has several results, so that one of them was displayed by the tested code; no points."
        others.append(error("SeveralResultsError", text))
    if any(_is_above(output, cell.metadata["nbgrader"].get("points", 0)) for output in results):
        text = "The result of this test cell is a number above the cell's points, so that it is no partial credit."
        others.append(error("ResultAboveMaximumError", text))
    cell.outputs = [*others, *results]


def _is_above(output: NotebookNode, points: float) -> bool:
    """Whether nbgrader would give up the whole notebook for this result. nbgrader.utils.get_partial_grade"""
    try:
        return float(output.data.get("text/plain", "")) > float(points)
    except ValueError:
        return False
