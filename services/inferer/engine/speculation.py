"""How many guessed tokens a batch checks: policy only, no runtime.

A batch takes longer with guesses (drafts) in it, and gives more tokens if they are right. Both are
measured: how often guesses were right, whether they were checked by a batch or not, and how long
the steps took.
"""

from collections import defaultdict, deque
from collections.abc import Collection
from statistics import median

from services.inferer.engine.sequence import Sequence

MAX_DRAFTS = 7
"""In one batch. The context has room for so many more outputs."""
MIN_GAIN = 1.1
"""Drafts are checked if all sequences together then get so many times as many tokens per second."""
MAX_DELAY = 1.1
"""Beside other sequences, which wait for the same batch, it may take so many times as long."""
RECENT_STEPS = 5
"""Times are medians of so many."""
LEAST_STEPS = 3
"""Fewer measurements are not trusted: the machine may have had other work."""
LONGEST_STREAK = 31
"""Longer ones count as this."""
ASSUMED_GUESSES = 4
"""The weight of what is assumed, in guesses that were seen."""
RECENT_GUESSES = 128
"""For each streak. When so many are counted, all of them count half: recent ones count most."""
FORGET_AFTER = 4096
"""Steps. What was measured may no longer be true, and what does not pay is not measured again."""


class Streaks:
    """How often a guess is right after so many right ones in a row (a streak), in the answers of
    all jobs: where an answer copies, it is likely to go on. Until that is known, it is assumed to
    be as likely as the rule of succession says: after n right ones, (n + 1) / (n + 2)."""

    def __init__(self) -> None:
        self._seen = [0.0] * (LONGEST_STREAK + 1)
        self._right = [0.0] * (LONGEST_STREAK + 1)

    def learn(self, streak: int, is_right: bool) -> None:
        """A guess after ``streak`` right ones in a row was right, or was not."""
        streak = min(streak, LONGEST_STREAK)
        self._seen[streak] += 1
        self._right[streak] += is_right
        if self._seen[streak] >= RECENT_GUESSES:
            self._seen[streak] /= 2
            self._right[streak] /= 2

    def chance(self, streak: int) -> float:
        """That the next guess is right."""
        streak = min(streak, LONGEST_STREAK)
        assumed = ASSUMED_GUESSES * (streak + 1) / (streak + 2)
        return (self._right[streak] + assumed) / (self._seen[streak] + ASSUMED_GUESSES)


class Speculation:
    """Not thread-safe: the scheduler owns it."""

    def __init__(self) -> None:
        self.streaks = Streaks()
        self._plain_s: defaultdict[int, deque[float]] = defaultdict(_recent)
        """How long steps without drafts took, by their number of sequences."""
        self._costs: defaultdict[tuple[int, int], deque[float]] = defaultdict(_recent)
        """How many times as long they took with drafts, by sequences and drafts."""
        self._known_costs: dict[tuple[int, int], float] = {}
        """The medians of those that were measured often enough."""
        self._steps = 0

    def learn(self, sequence: Sequence) -> None:
        """Count its latest guesses, whether they were checked or not."""
        for streak, is_right in sequence.guesses:
            self.streaks.learn(streak, is_right)
        sequence.guesses.clear()

    def counts(self, sequences: Collection[Sequence], room: int) -> list[int]:
        """How many drafts of each of ``sequences`` the next batch checks, at most ``room`` in all.
        All sequences generate, and nothing else is in the batch."""
        counts = [0] * len(sequences)
        chances: list[tuple[float, int]] = []
        for index, sequence in enumerate(sequences):
            self.learn(sequence)
            chance = 1.0
            for number in range(len(sequence.draft)):
                chance *= self.streaks.chance(sequence.streak + number)
                chances.append((chance, index))
        if not chances:
            return counts
        # The likeliest first: those of a sequence are in their order, as each one needs those
        # before it.
        chances.sort(reverse=True)
        del chances[min(MAX_DRAFTS, room) :]
        best = self._best_count(len(sequences), [chance for chance, _ in chances])
        for _, index in chances[:best]:
            counts[index] += 1
        return counts

    def _best_count(self, sequences: int, chances: list[float]) -> int:
        """How many drafts, which are right with these ``chances``, give most tokens per second."""
        if sequences not in self._plain_s:
            return 0
        best, speed = 0, sequences * MIN_GAIN
        tokens, cost = float(sequences), 1.0
        for count, chance in enumerate(chances, 1):
            tokens += chance
            known = self._known_costs.get((sequences, count))
            # Until it is known, it may cost no more than one draft less.
            cost = known or cost
            if tokens / cost > speed and (sequences == 1 or cost <= MAX_DELAY):
                best, speed = count, tokens / cost
            if known is None:
                break
        return best

    def observe(self, sequences: int, drafts: int, seconds: float) -> None:
        """Learn from a step of sequences that generate, with so many drafts in all."""
        if drafts:
            cost = seconds / median(self._plain_s[sequences])
            costs = self._costs[sequences, drafts]
            costs.append(max(cost, 1.0))
            if len(costs) >= LEAST_STEPS:
                self._known_costs[sequences, drafts] = median(costs)
        else:
            self._plain_s[sequences].append(seconds)
        self._steps += 1
        if self._steps % FORGET_AFTER == 0:
            self._plain_s.clear()
            self._costs.clear()
            self._known_costs.clear()


def _recent() -> deque[float]:
    return deque(maxlen=RECENT_STEPS)
