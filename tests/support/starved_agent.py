"""The agent on a machine where llama.cpp only fits with 85 % of the memory; see `starved_engine`."""

from __future__ import annotations

from potluck.command import main
from potluck_node import agent
from potluck_node.engines.registry import available_engines
from tests.support.starved_engine import StarvedEngine

FITS = (85, 1 << 20, 1 << 20)


def starved_engines(*arguments):
    engines = available_engines(*arguments)
    return {**engines, "llamacpp": StarvedEngine(engines["llamacpp"], FITS)}


if __name__ == "__main__":
    agent.available_engines = starved_engines
    main()
