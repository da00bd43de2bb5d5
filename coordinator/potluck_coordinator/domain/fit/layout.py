"""Gives a shape's stages their layers.

Decides by how fast each stage reads answers' weights, within what its memory holds beside the wished KV cache. It must not know verdicts.
"""

from __future__ import annotations

from dataclasses import replace

from potluck_coordinator.domain.fit.architecture import ModelArchitecture
from potluck_coordinator.domain.fit.layers import share_layers
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import stage_memory
from potluck_coordinator.domain.fit.shapes import Shape, Stage
from potluck_coordinator.domain.fit.stage_speed import stage_speed


def laid_out(architecture: ModelArchitecture, shape: Shape, load: Load) -> Shape:
    """The shape with its layers shared out."""
    if len(shape.stages) == 1:
        layers: tuple[int, ...] = (architecture.layer_count,)
    else:
        # Answers, which take most of the time, wait for their weights to be read alone; groups go by the same rate.
        speeds = [stage_speed(stage, load.traits).bytes_per_second for stage in shape.stages]
        capacities = [_capacity(architecture, stage, load) for stage in shape.stages]
        layers = share_layers(architecture.layer_count, speeds, capacities)
    return replace(shape, stages=tuple(replace(stage, layer_count=count) for stage, count in zip(shape.stages, layers, strict=True)))


def _capacity(architecture: ModelArchitecture, stage: Stage, load: Load) -> int:
    """How many layers, with the keys and values that the wish puts into them, a stage's fullest card has room for."""
    empty = stage_memory(architecture, replace(stage, layer_count=0), load)
    one = stage_memory(architecture, replace(stage, layer_count=1), load)
    return max(0, empty.spare_bytes // max(1, one.needed_bytes - empty.needed_bytes))
