"""How long steps take, measured as they run; and what follows from it: rows of a step, how long to wait for replies.

seconds of a step = plain (a step with replies alone) + work of its prompt rows * seconds of a row

The work of a row is 1 with no keys before it, and more with more of them (see `model/work.py`): a short question that
arrives while a long document is read gets the rows that it can have, and the document no more than it should.
"""

from __future__ import annotations

WEIGHT = 0.25  # of a new measurement in its moving average
RISING_WEIGHT = 0.5  # of one for a row that is higher than the average: slow moments of a machine come in runs
MOST_PLAIN_STEPS = 2.1  # a step with prompt rows takes about this many times a plain one; people notice beyond three
LEAST_ROWS, MOST_ROWS = 4, 512  # of prompts beside replies: fewer waste the weights' traffic, more gain nothing by it
FIRST_ROWS = 16  # until anything is measured
LEAST_MEASURED = 4  # less work says little about the time of a row
PATIENCE = 0.25  # of the last step's time, to choose a token in
DRAFT_PATIENCE = 1.0  # likewise, if a draft model guesses meanwhile
LEAST_PATIENCE_S, MOST_PATIENCE_S = 0.002, 0.05  # a thread needs the former to wake; the latter, people would notice


class StepTimes:
    """Moving averages of the two times, row_s that of a row with no keys before it. last_s: of the last step.

    patience: how long replies may take between steps, in such times.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self.plain_s: float | None = None
        self.row_s: float | None = None
        self.last_s = 0.0

    def record(self, prompt_work: float, seconds: float) -> None:
        """A step is over; so much was the work of its rows of prompts, besides those of replies."""
        self.last_s = seconds
        if not prompt_work:
            self.plain_s = _averaged(self.plain_s, seconds)
        elif prompt_work >= LEAST_MEASURED:
            row_s = max(seconds - (self.plain_s or 0.0), 0.0) / prompt_work
            rises = self.row_s is not None and row_s > self.row_s
            self.row_s = _averaged(self.row_s, row_s, RISING_WEIGHT if rises else WEIGHT)

    def budget(self, num_replies: int, num_prompts: int, most_rows: int) -> int:
        """Work of prompt rows in the next step. num_replies: those that are running; most_rows: what the model takes
        at once.

        With replies running, so few that none of their tokens waits longer than three plain steps.
        """
        if not num_replies:
            return most_rows if num_prompts <= 1 else min(MOST_ROWS, most_rows)
        if self.plain_s is None or not self.row_s:
            return min(FIRST_ROWS, most_rows)
        rows = int((MOST_PLAIN_STEPS - 1) * self.plain_s / self.row_s)
        return min(max(rows, LEAST_ROWS), MOST_ROWS, most_rows)

    @property
    def patience_s(self) -> float:
        """How long the next step waits for replies that took part in the last one and have not asked again."""
        return min(max(self._patience * self.last_s, LEAST_PATIENCE_S), MOST_PATIENCE_S * self._patience / PATIENCE)


def _averaged(average: float | None, value: float, weight: float = WEIGHT) -> float:
    return value if average is None else average + weight * (value - average)
