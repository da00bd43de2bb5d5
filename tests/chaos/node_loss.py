"""The only node dies, freezes or blocks in the middle of an answer: what the client sees and when, who is paid, whether the books balance.

Where another node has the model, the answer goes on there: `tests.chaos.stream_survival`.

    python -m tests.chaos.node_loss

prints a line for each fault with the seconds until the client knew, and exits 1 if a bound is broken.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.pool_processes import NodeProcess, Pool, audit, running_pool

TOKENS_BEFORE = 50
COMPLETION_PRICE = 4
FEE_BASIS_POINTS = 500
BOUND_SECONDS = {"killed": 2.0, "frozen": 15.0, "blocked": 15.0}


@dataclass(frozen=True, slots=True)
class Loss:
    """One fault and what came of it."""

    fault: str
    seconds_until_error: float
    token_count: int
    done: bool
    error_code: str
    charged_micro_credits: int
    earned_micro_credits: int
    back_after_seconds: float
    findings: tuple[str, ...]

    def broken(self) -> list[str]:
        """The promises that this fault broke."""
        broken = []
        if self.seconds_until_error > BOUND_SECONDS[self.fault]:
            broken.append(f"the client knew after {self.seconds_until_error:.2f} s, not {BOUND_SECONDS[self.fault]} s")
        if self.done or not self.error_code:
            broken.append("the answer did not end with a clear error")
        if not 0 < self.charged_micro_credits <= self.token_count * COMPLETION_PRICE:
            broken.append(f"charged {self.charged_micro_credits} for {self.token_count} tokens received")
        if self.charged_micro_credits < TOKENS_BEFORE * COMPLETION_PRICE:
            broken.append("the node was not paid for what was relayed")
        if self.earned_micro_credits != self.charged_micro_credits - self.charged_micro_credits * FEE_BASIS_POINTS // 10_000:
            broken.append(f"earned {self.earned_micro_credits} of {self.charged_micro_credits}")
        return [*broken, *self.findings]


def kill(node: NodeProcess) -> None:
    node.agent().send_signal(signal.SIGKILL)


def freeze(node: NodeProcess) -> None:
    node.agent().send_signal(signal.SIGSTOP)


def block(node: NodeProcess) -> None:
    node.agent().send_signal(signal.SIGUSR1)


FAULTS: dict[str, Callable[[NodeProcess], None]] = {"killed": kill, "frozen": freeze, "blocked": block}


def lose(pool: Pool, fault: str) -> Loss:
    """One answer, one fault in the middle of it; the node is back when this returns."""
    node = pool.nodes[0]
    with pool.client() as client:
        before = client.credits()
        stream = pool.stream()
        stream.read_tokens(TOKENS_BEFORE)
        FAULTS[fault](node)
        lost_at = time.monotonic()
        stream.read_to_end()
        seconds = time.monotonic() - lost_at
        if fault == "killed":
            node.start_again()
        if fault == "frozen":
            node.agent().send_signal(signal.SIGCONT)
        back_after_seconds = pool.wait_connected()
        after = client.credits()
        return Loss(
            fault=fault,
            seconds_until_error=seconds,
            token_count=stream.token_count,
            done=stream.done,
            error_code=(stream.error or {}).get("code", ""),
            # The operator pays and also owns the node: what it lost and what it earned are two accounts.
            charged_micro_credits=before.available_micro_credits - after.available_micro_credits - after.held_micro_credits,
            earned_micro_credits=after.earned_micro_credits - before.earned_micro_credits,
            back_after_seconds=back_after_seconds,
            findings=audit(pool) + (() if after.held_micro_credits == 0 else ("a hold is still open",)),
        )


def main() -> int:
    """Runs every fault once."""
    failed = False
    with tempfile.TemporaryDirectory() as folder, running_pool(Path(folder), node_module="tests.support.freezing_agent") as pool:
        for fault in FAULTS:
            loss = lose(pool, fault)
            broken = loss.broken()
            failed = failed or bool(broken)
            print(json.dumps({**asdict(loss), "broken": broken}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
