"""What `potluck fit` prints is what a node runs: the fit's facts through the plan, the wire and the node's engine, to the same words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from potluck_coordinator.architectures import known_architecture
from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.cards import CARD_MODELS
from potluck_coordinator.domain.fit.engines import VLLM, traits_of
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.flags import EngineFlags, engine_shape, flags_of
from potluck_coordinator.domain.fit.hardware import NodeCard, NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.interconnect import ALONE
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.memory import shape_memory
from potluck_coordinator.domain.fit.shapes import Shape, ShapeKind, Stage
from potluck_coordinator.domain.planning.node_kinds import whole_room
from potluck_coordinator.domain.planning.sizing import Sizer
from potluck_coordinator.domain.planning.words import Sizing
from potluck_coordinator.fit_command import app
from potluck_node.domain.plan import LocalLimits, ObservedReplica, Phase, Refuse, Start, plan
from potluck_node.domain.step_down import Ceiling, plan_of
from potluck_node.engines import vllm
from potluck_node.engines.base import EngineLaunch
from potluck_protocol import engine_codec
from potluck_protocol.card_facts import CardFacts, PeerAccess
from potluck_protocol.values import Accelerator, DesiredEngine, DesiredState, EngineShape, GroupPlace, ModelFile, ModelId, ReplicaId
from tests.support.planning import card_entry, node

CONTEXT = 4096
FILE = ModelFile(ModelId("m"), f"hf:org/m@{'a' * 40}", "model.safetensors", "0" * 64, 1)
OWN_VARIABLES = set(vllm.variables(EngineLaunch(ModelId("m"), Path("/m"), 1, 1)))
"""Those of every engine: where it listens, and what it must not send."""


def on_the_node(wish: DesiredEngine) -> tuple[tuple[str, ...], dict[str, str]]:
    """The flags and variables of a wish that has travelled, as the node would start it, without its own."""
    message = engine_codec.desired_state_message(DesiredState(1, (wish,)))
    (came,) = engine_codec.desired_state_value(type(message).FromString(message.SerializeToString())).engines
    assert came == wish
    taken = plan_of(came, Ceiling())
    launch = EngineLaunch(
        came.model.model_id,
        Path("/models/m"),
        taken.slot_count,
        taken.context_length_tokens,
        came.shape,
        taken.memory_utilization_percent,
        came.group,
    )
    words = vllm.flags(launch)
    alone = vllm.flags(EngineLaunch(came.model.model_id, Path("/models/m"), 1, 1))
    before, after = alone.index("--max-model-len"), len(alone) - alone.index("--host")
    assert (words[:before], words[-after:]) == (alone[:before], alone[-after:]), "paths, names, ports and the door are every engine's"
    told = {name: value for name, value in vllm.variables(launch).items() if name not in OWN_VARIABLES}
    return words[before:-after], told


def wish_of(sizing: Sizing) -> DesiredEngine:
    return DesiredEngine(ReplicaId("n/m"), FILE, sizing.engine_kind, sizing.slot_count, sizing.context_length_tokens, sizing.shape)


def by_place(flags: EngineFlags, uuids: tuple[str, ...]) -> dict[str, str]:
    """The printed environment with the node's names of its cards."""
    told = dict(flags.environment)
    if "CUDA_VISIBLE_DEVICES" in told:
        told["CUDA_VISIBLE_DEVICES"] = ",".join(uuids[int(place)] for place in told["CUDA_VISIBLE_DEVICES"].split(","))
    return told


def cards(
    name: str, count: int, capability: str, pairs: tuple[tuple[int, int], ...] = (), *, patched_driver: bool = False
) -> tuple[Accelerator, ...]:
    peers = {first: second for pair in pairs for first, second in (pair, pair[::-1])}
    made = []
    for place in range(count):
        peer = (f"GPU-{peers[place]}",) if place in peers else ()
        reached = tuple(f"GPU-{other}" for other in range(count) if patched_driver and other != place)
        size_bytes = int(CARD_MODELS[name].memory_gib * GIB)
        made.append(Accelerator(name, f"GPU-{place}", size_bytes, capability, nvlink_peer_uuids=peer, pcie_peer_uuids=reached))
    return tuple(made)


PAIRS = ((0, 1), (2, 3))
BOXES = {
    "one 3090": ("8b", cards("rtx3090", 1, "8.6"), {}),
    "a desktop with 5 GiB taken": ("8b", cards("rtx3090", 1, "8.6"), {"GPU-0": 5 * GIB}),
    "two without a bridge": ("32b", cards("rtx3090", 2, "8.6"), {"GPU-0": 3 * GIB, "GPU-1": 2 * GIB}),
    "a bridged pair": ("70b", cards("rtx3090", 2, "8.6", PAIRS[:1]), {}),
    "four, stock driver": ("70b", cards("rtx3090", 4, "8.6"), {}),
    "four, patched driver": ("70b", cards("rtx3080ti", 4, "8.6", patched_driver=True), {}),
    "three where two are too few": ("70b", cards("rtx3090", 3, "8.6"), dict.fromkeys(("GPU-0", "GPU-1", "GPU-2"), 6 * GIB)),
    "three, patched driver": (
        "70b",
        cards("rtx3090", 3, "8.6", patched_driver=True),
        dict.fromkeys(("GPU-0", "GPU-1", "GPU-2"), 6 * GIB),
    ),
    "four smaller ones": ("70b", cards("rtx3080ti", 4, "8.6"), {}),
    "four in two bridged pairs": (
        "70b",
        cards("rtx3090", 4, "8.6", PAIRS),
        dict.fromkeys(("GPU-0", "GPU-1", "GPU-2", "GPU-3"), 6 * GIB),
    ),
    "before Ampere": ("8b", cards("rtx2080ti", 1, "7.5"), {}),
    "two before Ampere": ("8b", cards("rtx2080ti", 2, "7.5", PAIRS[:1]), {"GPU-0": 4 * GIB, "GPU-1": 4 * GIB}),
    "no card": ("8b", (), {}),
}


def pairs_of(names: tuple[str, ...], peers: list[tuple[str, ...]]) -> tuple[tuple[int, int], ...]:
    return tuple((place, names.index(peer)) for place, named in enumerate(peers) for peer in named if place < names.index(peer))


@pytest.mark.parametrize(("size", "accelerators", "foreign"), BOXES.values(), ids=BOXES)
def test_the_printed_flags_are_the_started_ones(size: str, accelerators: tuple[Accelerator, ...], foreign: dict[str, int]) -> None:
    entry = card_entry(size, slot_count=1024 if accelerators else 2)
    here = node("n", cards=accelerators, card_foreign_bytes=foreign, memory_gib=64)
    sizer = Sizer()
    sizing = sizer.size(entry, sizer.kind_of(here), whole_room(here.inventory))
    assert isinstance(sizing, Sizing), sizing
    names = tuple(card.uuid for card in accelerators)
    boxed = []
    for card in accelerators:
        model = CARD_MODELS[card.name]
        boxed.append(NodeCard(model, min(model.memory_bytes, card.memory_bytes) - foreign.get(card.uuid, 0)))
    bridges, peers = (
        pairs_of(names, [getattr(card, field) for card in accelerators]) for field in ("nvlink_peer_uuids", "pcie_peer_uuids")
    )
    processor = NodeProcessor(whole_room(here.inventory).memory_bytes, 40, 8)
    box = NodeHardware(tuple(boxed), bridges, peers, processor=processor)
    wanted = 1 if accelerators else sizing.slot_count
    architecture = replace(entry.architecture, weight_bytes_of_files=entry.file.size_bytes)
    report = fit(architecture, (box,), engine_kind=VLLM, context_length_tokens=CONTEXT, sequence_count_wanted=wanted)
    found = next(each for each in report.shapes if each.runs and each.shape.cards_per_replica == len(sizing.shape.card_uuids))
    slots = str(sizing.slot_count)
    printed = list(found.flags.arguments)
    # How many sequences is the catalogue's to say.
    printed[printed.index("--max-num-seqs") + 1] = slots
    started, told = on_the_node(wish_of(sizing))
    assert list(started) == printed
    assert told == by_place(found.flags, names)


@pytest.mark.parametrize(
    ("words", "expected", "environment"),
    [
        (["--gpu", "rtx3090:4"], {"--tensor-parallel-size", "--disable-custom-all-reduce"}, {"NCCL_P2P_DISABLE": "1"}),
        (["--gpu", "rtx3090:4", "--nvlink", "0-1,2-3"], {"--disable-custom-all-reduce"}, {"NCCL_P2P_LEVEL": "NVL"}),
        (["--gpu", "rtx2080ti:4"], {"--dtype", "half"}, {}),
    ],
)
def test_the_command_line_prints_what_those_facts_become_on_a_node(words, expected, environment):
    model = "qwen2.5-32b-instruct-awq"
    report = json.loads(CliRunner().invoke(app, [model, *words, "--json"]).output)
    four = next(shape for shape in report["shapes"] if len(shape["shape"]["stages"][0]["cards"]) == 4)
    arguments, variables = four["flags"]["arguments"], dict(four["flags"]["environment"])
    assert expected <= set(arguments)
    assert environment.items() <= variables.items()
    bridges = PeerAccess.BRIDGES if "NCCL_P2P_LEVEL" in variables else PeerAccess.ANY
    peers = PeerAccess.NONE if "NCCL_P2P_DISABLE" in variables else bridges
    facts = CardFacts(
        int(100 * float(arguments[arguments.index("--gpu-memory-utilization") + 1])),
        half_precision="--dtype" in arguments,
        without_custom_all_reduce="--disable-custom-all-reduce" in arguments,
        peer_access=peers,
    )
    slots = int(arguments[arguments.index("--max-num-seqs") + 1])
    shape = EngineShape(("0", "1", "2", "3"), 4, "awq", card_facts=facts)
    assert on_the_node(DesiredEngine(ReplicaId("r"), FILE, "vllm", slots, CONTEXT, shape)) == (tuple(arguments), variables)


def layers_over(architecture: ModelArchitecture, *groups: tuple[int, ...]) -> Shape:
    card = NodeCard(CARD_MODELS["rtx3090"])
    each = architecture.layer_count // len(groups)
    stages = tuple(
        Stage(0, group, (card,) * len(group), ALONE, layer_count=each, is_first=not number) for number, group in enumerate(groups)
    )
    return Shape(ShapeKind.PIPELINE, stages)


@pytest.mark.parametrize("groups", [((0,), (1,)), ((0, 1), (2, 3)), ((2,), (0,), (3,), (1,))])
def test_layers_over_the_cards_of_one_box_are_said_alike(groups):
    architecture = known_architecture("qwen2.5-32b-instruct-awq")
    shape, load = layers_over(architecture, *groups), Load(traits_of(VLLM), CONTEXT, 2)
    memory = shape_memory(architecture, shape, load)
    flags = flags_of(architecture, shape, load, memory, 2)
    told = engine_shape(shape, memory, ("0", "1", "2", "3"), pages_kv=True, quantization="awq")
    arguments, variables = on_the_node(DesiredEngine(ReplicaId("r"), FILE, "vllm", 2, CONTEXT, told))
    assert (arguments, variables) == (flags.arguments, dict(flags.environment))
    assert arguments[arguments.index("--pipeline-parallel-size") + 1] == str(len(groups))
    assert variables["VLLM_PP_LAYER_PARTITION"] == ",".join([str(64 // len(groups))] * len(groups))


LIMITS = LocalLimits(frozenset({"vllm"}))
GOOD = EngineShape(("GPU-1", "GPU-2"), 2, card_facts=CardFacts(90, peer_access=PeerAccess.NONE))
PLACE = GroupPlace("g", 1, 0, "10.0.0.1", 1, "10.0.0.1", (1, 1))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (replace(GOOD, card_facts=CardFacts(96)), "96 % of a card's memory"),
        (replace(GOOD, card_facts=CardFacts(-1)), "-1 % of a card's memory"),
        (replace(GOOD, card_uuids=("0,1", "2")), "not named as cards are"),
        (replace(GOOD, card_uuids=("0\nLD_PRELOAD=/x", "2")), "not named as cards are"),
        (replace(GOOD, card_uuids=("--x", "2")), "not named as cards are"),
        (replace(GOOD, card_uuids=tuple(map(str, range(65)))), "not named as cards are"),
        (replace(GOOD, tensor_parallel_size=0), "groups of 0"),
        (replace(GOOD, tensor_parallel_size=-2), "groups of -2"),
        (replace(GOOD, card_uuids=("1", "2", "3")), "3 cards cannot be groups of 2"),
        (replace(GOOD, stage_layer_counts=(1, 1)), "cannot hold 2 stages"),
        (replace(GOOD, tensor_parallel_size=1, stage_layer_counts=(1, 2000)), "cannot hold 2 stages"),
        (replace(GOOD, kv_cache_bytes=-1), "less than no memory"),
    ],
)
def test_what_no_engine_is_started_with_is_refused_by_the_node(shape, words):
    wish = DesiredEngine(ReplicaId("r"), FILE, "vllm", 2, CONTEXT, shape)
    (action,) = plan(DesiredState(1, (wish,)), {}, LIMITS, 0.0).actions
    assert isinstance(action, Refuse)
    assert words in action.reason
    good = replace(wish, shape=GOOD)
    (action,) = plan(DesiredState(1, (good,)), {good.replica_id: ObservedReplica(good, Phase.FETCHED)}, LIMITS, 0.0).actions
    assert action == Start(good)


def test_a_word_that_a_newer_coordinator_has_for_the_cards_ways_goes_through_memory_and_old_bytes_are_read():
    message = engine_codec.desired_state_message(DesiredState(1, (DesiredEngine(ReplicaId("r"), FILE, "vllm", 2, CONTEXT, GOOD),)))
    shape = message.engines[0].shape
    shape.card_facts.peer_access = 7
    assert engine_codec.desired_state_value(message).engines[0].shape.card_facts.peer_access is PeerAccess.NONE
    shape.ClearField("card_facts")
    assert engine_codec.desired_state_value(message).engines[0].shape == replace(GOOD, card_facts=CardFacts())
