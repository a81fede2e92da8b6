"""Look inside a mixture: who chooses whom, on one self-contained page."""

from moefold.inspect.choices import Choices, SiteChoices, Tally
from moefold.inspect.page import Page

__all__ = ["Choices", "Page", "SiteChoices", "Tally"]
