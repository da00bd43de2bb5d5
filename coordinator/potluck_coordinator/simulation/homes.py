"""When volunteers' machines are there: sessions by a distribution and the hour, or as a trace recorded them.

Decides who is there at the beginning and when each comes and goes. It must not know what they do meanwhile.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

from potluck_coordinator.simulation.agenda import Agenda
from potluck_coordinator.simulation.node_model import Node
from potluck_coordinator.simulation.scenario import Churn, Scenario
from potluck_protocol.errors import ErrorCode, PotluckError

HOURS_OF_DAY = 24


class Homes:
    """The comings and goings of one class of nodes."""

    def __init__(self, churn: Churn, scenario: Scenario, agenda: Agenda, random: Random, nodes: Sequence[Node]) -> None:
        self._churn = churn
        self._scenario = scenario
        self._agenda = agenda
        self._random = random
        self._nodes = nodes
        self.departure_count = 0

    def begin(self) -> None:
        """Puts the first comings and goings on the agenda."""
        churn = self._churn
        if churn.trace:
            self._follow(churn.trace)
            return
        for node in self._nodes:
            if churn.session_hours == 0:
                node.come()
                continue
            # As an observer finds it who looks at some moment: there by its share of the time.
            here_share = churn.session_hours / (churn.session_hours + churn.away_hours)
            if self._random.random() < here_share:
                node.come()
                self._agenda.after(self._random.random() * self._stay_seconds(), self._go, node)
            else:
                self._agenda.after(self._random.random() * self._away_seconds(), self._come, node)

    def _come(self, node: Node) -> None:
        node.come()
        self._agenda.after(self._stay_seconds(), self._go, node)

    def _go(self, node: Node) -> None:
        hourly = self._churn.hourly
        hour = int((self._scenario.begins_at_hour + self._agenda.now / 3600) % HOURS_OF_DAY)
        if hourly and self._random.random() * max(hourly) > hourly[hour]:
            # In this hour of the day it would rather stay a little longer.
            self._agenda.after(self._random.random() * 3600, self._go, node)
            return
        self._leave(node)
        self._agenda.after(self._away_seconds(), self._come, node)

    def _leave(self, node: Node) -> None:
        self.departure_count += 1
        node.leave(goodbye=self._random.random() < self._churn.goodbye_share)

    def _stay_seconds(self) -> float:
        return 3600 * self._random.lognormvariate(math.log(self._churn.session_hours), self._churn.session_spread)

    def _away_seconds(self) -> float:
        return 3600 * self._random.lognormvariate(math.log(self._churn.away_hours), self._churn.session_spread)

    def _follow(self, trace: str) -> None:
        for number, came_hours, left_hours in read_trace(Path(trace), len(self._nodes)):
            self._agenda.at(came_hours * 3600, self._nodes[number].come)
            self._agenda.at(left_hours * 3600, self._leave, self._nodes[number])


def read_trace(path: Path, node_count: int) -> list[tuple[int, float, float]]:
    """Node number, hour it came, hour it left, line by line.

    Raises:
        PotluckError: INVALID_REQUEST for a file that cannot be read so, with the line.
    """
    try:
        lines = path.read_text().splitlines()
        rows = list(csv.reader(lines))
    except (OSError, ValueError, csv.Error) as error:
        # A ValueError is bytes that are no text, or a path with a zero byte in it.
        reason = error.strerror if isinstance(error, OSError) else error
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"churn.trace: {str(path)!r} cannot be read: {reason}.") from error
    sessions: list[tuple[int, float, float]] = []
    for place, cells in enumerate(rows, start=1):
        if not cells or cells[0].startswith("#"):
            continue
        try:
            number, came, left = int(cells[0]), float(cells[1]), float(cells[2])
        except (ValueError, IndexError):
            number, came, left = -1, 0.0, 0.0
        if not (0 <= number < node_count and 0 <= came < left and math.isfinite(left)):
            words = f"a line is NODE,HOUR IT CAME,HOUR IT LEFT, with a node from 0 to {node_count - 1}"
            raise PotluckError(ErrorCode.INVALID_REQUEST, f"{path}, line {place}: {words}.")
        sessions.append((number, came, left))
    return sessions
