"""Which requests engines die of: told by who was with them when they died.

Decides, for nodes and gateways alike, when a request is refused for a while. Whoever was with an engine at its end is a suspect until it
was answered in full. A suspect is refused after two deaths if no other request was at both; after three if few others were at all of them;
and after four whoever else was there. So a request that kills engines by itself kills two, and those that only ran beside it are not
blamed before there is no other way. Blame by who else was there may be wrong, by chance or by somebody's design, and so it ends; what is
refused for good is the coordinator's to say (its `domain.lethal`). It must not know engines, and keeps no request: only keyed hashes.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, NewType

from potluck_protocol.values import Endpoint

Fingerprint = NewType("Fingerprint", bytes)

COMMON_MAX_AT_DEATHS: Final = {2: 1, 3: 4}
"""How many requests may have been at all of a suspect's deaths, itself among them, for it to be refused after so many."""
DEATHS_MAX: Final = 4
"""After so many it is refused whoever else was there."""
LINE_UP_MAX: Final = 16
"""So few suspects are told apart by never running two of them on one engine; with more, that would keep too many waiting."""
DEATHS_KEPT_MAX: Final = 64
DEATH_KEPT_SECONDS: Final = 6 * 3600.0
REFUSED_KEPT_MAX: Final = 4096
REFUSED_KEPT_SECONDS: Final = 3600.0
"""Long enough for clients to give up. An innocent request that was put beside several killers, each another one, is refused no longer."""
FINGERPRINT_BYTES: Final = 16


def is_culprit(suspect: Fingerprint, deaths: Sequence[Collection[Fingerprint]]) -> bool:
    """Whether engines die of it, by who was at each death."""
    death_count = sum(suspect in present for present in deaths)
    return death_count >= DEATHS_MAX or 0 < len(line_up(suspect, deaths)) <= COMMON_MAX_AT_DEATHS.get(death_count, 0)


def line_up(suspect: Fingerprint, deaths: Sequence[Collection[Fingerprint]]) -> frozenset[Fingerprint]:
    """Who was at every death that the suspect was at, itself included: one of them did it. Empty for one that was at none."""
    present = [frozenset(death) for death in deaths if suspect in death]
    return frozenset.intersection(*present) if present else frozenset()


class Culprits:
    """What one process knows of the deaths it has seen.

    Args:
        now: monotonic seconds.
        key: of the fingerprints; one that ends with this process where none is given.
    """

    def __init__(self, now: Callable[[], float], key: bytes = b"") -> None:
        self._now = now
        self._key = key or secrets.token_bytes(32)
        self._deaths: deque[tuple[float, set[Fingerprint]]] = deque(maxlen=DEATHS_KEPT_MAX)
        self._refused: dict[Fingerprint, float] = {}

    def fingerprint(self, endpoint: Endpoint, body: bytes) -> Fingerprint:
        """The same for the same request, and no way back to it."""
        return Fingerprint(hashlib.blake2b(body, digest_size=FINGERPRINT_BYTES, key=self._key, person=endpoint.name.encode()[:16]).digest())

    @property
    def has_any(self) -> bool:
        """Whether there is anything to look a request up in: where engines do not die, none is hashed for that."""
        return bool(self._deaths or self._refused)

    def died(self, present: Iterable[Fingerprint]) -> None:
        """An engine died, and may have died of one of these."""
        suspects = set(present)
        if not suspects:
            return
        self._forget_old()
        self._deaths.append((self._now(), suspects))
        for culprit in [suspect for suspect in suspects if is_culprit(suspect, self._present)]:
            self._refuse(culprit)

    def clear(self, answered: Fingerprint) -> None:
        """It was answered in full, so engines stand it."""
        for present in self._present:
            present.discard(answered)

    def is_suspect(self, fingerprint: Fingerprint) -> bool:
        """It is one of few of whom one has killed an engine: it should not run where another suspect does."""
        self._forget_old()
        return 0 < len(line_up(fingerprint, self._present)) <= LINE_UP_MAX

    def is_refused(self, fingerprint: Fingerprint) -> bool:
        """It is not to run again."""
        self._forget_old()
        return fingerprint in self._refused

    @property
    def _present(self) -> list[set[Fingerprint]]:
        return [present for _, present in self._deaths]

    def _refuse(self, culprit: Fingerprint) -> None:
        self._refused[culprit] = self._now()
        if len(self._refused) > REFUSED_KEPT_MAX:
            del self._refused[next(iter(self._refused))]
        # The others at those deaths were there with the culprit.
        self._deaths = deque((death for death in self._deaths if culprit not in death[1]), maxlen=DEATHS_KEPT_MAX)

    def _forget_old(self) -> None:
        now = self._now()
        while self._deaths and now - self._deaths[0][0] > DEATH_KEPT_SECONDS:
            self._deaths.popleft()
        # In the order in which they were refused.
        while self._refused and now - next(iter(self._refused.values())) > REFUSED_KEPT_SECONDS:
            del self._refused[next(iter(self._refused))]
