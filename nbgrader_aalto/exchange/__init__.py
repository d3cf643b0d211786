"""nbgrader's exchange for several instructors, with submissions that are really hidden.

Seven classes, named as nbgrader's defaults, which they extend; `nbgrader_aalto.configure(c)` sets them. See `base`
for the directories and `vault` and `boxes` for how submissions come in and feedback goes out.
"""

from nbgrader_aalto.exchange.base import AaltoExchange
from nbgrader_aalto.exchange.collect import ExchangeCollect
from nbgrader_aalto.exchange.fetch_assignment import ExchangeFetchAssignment
from nbgrader_aalto.exchange.fetch_feedback import ExchangeFetchFeedback
from nbgrader_aalto.exchange.list import ExchangeList
from nbgrader_aalto.exchange.release_assignment import ExchangeReleaseAssignment
from nbgrader_aalto.exchange.release_feedback import ExchangeReleaseFeedback
from nbgrader_aalto.exchange.submit import ExchangeSubmit

__all__ = [
    "AaltoExchange",
    "ExchangeCollect",
    "ExchangeFetchAssignment",
    "ExchangeFetchFeedback",
    "ExchangeList",
    "ExchangeReleaseAssignment",
    "ExchangeReleaseFeedback",
    "ExchangeSubmit",
]
