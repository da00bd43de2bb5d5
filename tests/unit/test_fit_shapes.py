"""Which cards the fit knows, how they are joined, which shapes there are on them, and how layers and flags follow."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from potluck_coordinator.architectures import known_architecture
from potluck_coordinator.domain.fit.architecture import GIB, ModelArchitecture
from potluck_coordinator.domain.fit.card_groups import card_groups
from potluck_coordinator.domain.fit.cards import CARD_MODELS, card_model, unlisted_card
from potluck_coordinator.domain.fit.engines import CUDA_CONTEXT_BYTES, LLAMACPP, VLLM, decode_share_at, prefill_share_at, traits_of
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.flags import EngineFlags
from potluck_coordinator.domain.fit.hardware import BoxLink, NodeCard, NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.interconnect import (
    Link,
    all_reduce_seconds,
    group_link,
    hop_between_seconds,
    hop_inside_seconds,
)
from potluck_coordinator.domain.fit.layers import share_layers
from potluck_coordinator.domain.fit.report import ShapeFit
from potluck_coordinator.domain.fit.shapes import Shape, ShapeKind, groups_of, tensor_parallel_divides

RTX3090 = CARD_MODELS["rtx3090"]
PAIRS = ((0, 1), (2, 3))
LLAMA_8B = known_architecture("llama-3-8b-instruct")
AWQ_70B = known_architecture("llama-3-70b-instruct-awq")
AWQ_32B = known_architecture("qwen2.5-32b-instruct-awq")


def box(*names: str, nvlink: tuple[tuple[int, int], ...] = (), peers: bool = False) -> NodeHardware:
    pairs = tuple(combinations(range(len(names)), 2)) if peers else ()
    return NodeHardware(tuple(NodeCard(CARD_MODELS[name]) for name in names), nvlink_pairs=nvlink, pcie_peer_pairs=pairs)


def shapes(architecture: ModelArchitecture, *boxes: NodeHardware, engine: str = VLLM) -> list[Shape]:
    return list(groups_of(architecture, boxes, traits_of(engine)))


def answer(
    architecture: ModelArchitecture, *boxes: NodeHardware, engine: str = VLLM, tensor_parallel: int = 1, stages: int = 1
) -> ShapeFit:
    report = fit(architecture, boxes, engine_kind=engine, context_length_tokens=4096, sequence_count_wanted=2)
    return next(fit for fit in report.shapes if (fit.shape.tensor_parallel, len(fit.shape.stages)) == (tensor_parallel, stages))


def flag(flags: EngineFlags, name: str) -> str:
    return flags.arguments[flags.arguments.index(name) + 1]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090ti"),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx2080ti"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("RTX 4090", "rtx4090"),
        ("h100-pcie", "h100-pcie"),
    ],
)
def test_a_driver_name_leads_to_its_card(name: str, known: str) -> None:
    assert card_model(name) is CARD_MODELS[known]


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 3080 12GB", "NVIDIA GeForce RTX 3090 Laptop GPU", "NVIDIA GeForce GTX 1080", "", "RTX"]
)
def test_a_card_that_is_not_in_the_table_is_not_taken_for_another(name: str) -> None:
    assert card_model(name) is None


def test_the_table_says_what_the_data_sheets_say() -> None:
    assert RTX3090.memory_bytes / GIB == pytest.approx(23.58, abs=0.03)
    assert RTX3090.peak_tflops == pytest.approx(142, rel=0.01)
    assert RTX3090.fp32_accumulate_tflops == pytest.approx(71, rel=0.01)
    assert CARD_MODELS["a100-80"].fp32_accumulate_tflops == pytest.approx(312, rel=0.01)
    assert CARD_MODELS["h100"].fp32_accumulate_tflops == pytest.approx(989, rel=0.02)


def test_an_unlisted_card_has_its_memory_and_a_low_speed() -> None:
    card = unlisted_card("GTX 1080", 8 * GIB, (6, 1))
    assert card.memory_bytes <= 8 * GIB
    assert card.bandwidth_gb_per_second <= CARD_MODELS["rtx3060"].bandwidth_gb_per_second
    assert card.compute_capability == (6, 1)


def test_a_pair_is_named_by_cards_that_are_there() -> None:
    with pytest.raises(ValueError, match="NVLink pair 0-2 names no two of the 2 cards"):
        box("rtx3090", "rtx3090", nvlink=((0, 2),))


@pytest.mark.parametrize(
    ("hardware", "group", "kind"),
    [
        (box("rtx3090"), (0,), Link.NONE),
        (box(*["rtx3090"] * 4, nvlink=PAIRS), (0, 1), Link.NVLINK),
        (box(*["rtx3090"] * 4, nvlink=PAIRS), (0, 2), Link.HOST),
        (box(*["rtx3090"] * 4, nvlink=PAIRS), (0, 1, 2, 3), Link.HOST),
        (box(*["rtx3090"] * 4, nvlink=PAIRS, peers=True), (0, 1, 2, 3), Link.PEER),
        (replace(box(*["rtx3090"] * 3), pcie_peer_pairs=((1, 0),)), (0, 1), Link.PEER),
        (replace(box(*["rtx3090"] * 3), pcie_peer_pairs=((0, 1), (1, 2))), (0, 1, 2), Link.HOST),
        (replace(box(*["rtx3090"] * 3), nvlink_pairs=((0, 1),), pcie_peer_pairs=((0, 2), (1, 2))), (0, 1, 2), Link.PEER),
        (box("rtx4090", "rtx4090", nvlink=((0, 1),)), (0, 1), Link.HOST),
    ],
)
def test_a_group_is_as_well_joined_as_its_worst_pair(hardware: NodeHardware, group: tuple[int, ...], kind: Link) -> None:
    assert group_link(hardware, group).kind is kind


def test_an_all_reduce_takes_longer_over_worse_links_more_cards_and_fewer_lanes() -> None:
    bridged, peers, plain = (
        group_link(box("rtx3090", "rtx3090", nvlink=nvlink, peers=peers), (0, 1))
        for nvlink, peers in ((((0, 1),), False), ((), True), ((), False))
    )
    times = [all_reduce_seconds(link, 2, 8192) for link in (bridged, peers, plain)]
    assert times == sorted(times)
    assert all_reduce_seconds(plain, 1, 8192) == 0
    assert all_reduce_seconds(plain, 4, 8192) > times[2]
    narrow = NodeHardware((NodeCard(RTX3090, pcie_width=4), NodeCard(RTX3090)))
    assert all_reduce_seconds(group_link(narrow, (0, 1)), 2, 10**7) > 3 * all_reduce_seconds(plain, 2, 10**7)


def test_a_hop_between_boxes_is_one_way_and_the_data() -> None:
    """Petals' steps over three servers and back took 200 ms longer when 50 ms were added to each of the four ways (arXiv 2312.08361)."""
    assert 4 * (hop_between_seconds(BoxLink(100, 1), 0) - hop_between_seconds(BoxLink(0, 1), 0)) == pytest.approx(0.2)
    assert hop_between_seconds(BoxLink(0, 1), 1e9 / 8) == pytest.approx(1)
    assert hop_inside_seconds([NodeCard(RTX3090)], 11.28e9) == pytest.approx(1, rel=0.01)


def test_less_power_costs_prompts_more_than_answers_and_nothing_above_the_board() -> None:
    assert prefill_share_at(250, RTX3090) == pytest.approx(8436 / 9893, abs=0.01)
    assert decode_share_at(250, RTX3090) == pytest.approx(67.57 / 69.16, abs=0.01)
    assert prefill_share_at(None, RTX3090) == prefill_share_at(500, RTX3090) == decode_share_at(500, RTX3090) == 1
    assert 0 < prefill_share_at(50, RTX3090) < prefill_share_at(100, RTX3090) < decode_share_at(100, RTX3090)


def test_bridged_pairs_stay_together_and_like_cards_with_like() -> None:
    hardware = box("rtx3090", "rtx4090", "rtx3090", "rtx4090", nvlink=((0, 2),))
    assert card_groups(hardware, 2) == ((0, 2), (1, 3))
    assert card_groups(box(*["rtx3090"] * 5), 2) == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("names", "nvlink", "group_size", "groups"),
    [
        (["rtx3060", *["rtx3090"] * 3], (), 3, [(1, 2, 3)]),
        ([*["rtx3090"] * 3, *["rtx3060"] * 3], (), 3, [(0, 1, 2), (3, 4, 5)]),
        (["rtx3060", "rtx3090"] * 3, (), 3, [(1, 3, 5), (0, 2, 4)]),
        (["rtx3090"] * 3 + ["rtx2080ti"] * 2, ((3, 4),), 2, [(0, 1), (3, 4)]),
        (["rtx2080ti", "rtx2080ti", *["rtx3090"] * 2], ((0, 1),), 2, [(2, 3), (0, 1)]),
        (["rtx3090"] * 6, ((1, 4), (2, 5)), 3, [(0, 1, 4), (2, 3, 5)]),
        (["rtx3060", *["rtx3090"] * 4], ((1, 2), (3, 4)), 3, [(1, 2, 3)]),
        # Equally large, and of two models: the pair's like before the other, and before another pair.
        ([*["rtx3090"] * 3, "l4"], ((0, 1),), 3, [(0, 1, 2)]),
        ([*["rtx3090"] * 3, "a5000"], ((0, 1),), 3, [(0, 1, 2)]),
        ([*["rtx3090"] * 4, *["a5000"] * 2], ((0, 1), (4, 5)), 4, [(0, 1, 2, 3)]),
        ([*["rtx3090"] * 2, "rtx3090ti", *["l4"] * 2], ((0, 1),), 4, [(0, 1, 3, 4)]),
        # No group of one model: pairs stay whole.
        ([*["rtx3090"] * 3, *["a5000"] * 2], ((0, 1), (3, 4)), 4, [(0, 1, 3, 4)]),
        ([*["a5000"] * 3, *["rtx3090"] * 2], ((0, 1), (3, 4)), 4, [(0, 1, 3, 4)]),
    ],
)
def test_the_largest_cards_come_first_and_a_pair_is_parted_only_for_memory(names, nvlink, group_size, groups) -> None:
    assert list(card_groups(box(*names, nvlink=nvlink), group_size)) == groups


def test_a_model_over_three_cards_is_as_fast_beside_a_slow_card_as_without_it() -> None:
    model = known_architecture("llama-3-70b-instruct-awq")
    alone, beside = (answer(model, box(*names, nvlink=((0, 1),)), stages=3) for names in (["rtx3090"] * 3, [*["rtx3090"] * 3, "l4"]))
    assert beside.shape.label == alone.shape.label
    assert beside.rates == alone.rates


FP16_32B = known_architecture("qwen2.5-32b-instruct")


@pytest.mark.parametrize("names", [["rtx3090"] * 3 + ["rtx3060"] * 3, ["rtx3060"] * 3 + ["rtx3090"] * 3, ["rtx3060", "rtx3090"] * 3])
def test_small_cards_are_no_copy_of_a_pipeline_over_large_ones(names: list[str]) -> None:
    report = fit(FP16_32B, [box(*names)], engine_kind=VLLM, context_length_tokens=2048, sequence_count_wanted=1)
    threes = {
        shape.shape.stages[0].cards[0].model.name: (shape.shape.replica_count, shape.runs)
        for shape in report.shapes
        if shape.shape.cards_per_replica == 3
    }
    assert threes == {"rtx3090": (1, True), "rtx3060": (1, False)}


@pytest.mark.parametrize("place", range(4))
def test_a_model_runs_over_three_large_cards_wherever_a_small_one_stands_beside_them(place: int) -> None:
    names = ["rtx3090"] * 3
    names.insert(place, "rtx3060")
    report = fit(FP16_32B, [box(*names)], engine_kind=VLLM, context_length_tokens=2048, sequence_count_wanted=1)
    assert report.best is not None
    assert [stage.cards[0].model.name for stage in report.best.shape.stages] == ["rtx3090"] * 3


def test_vllm_has_copies_and_tensor_parallel_groups_in_a_box_and_llamacpp_has_layers() -> None:
    four = box(*["rtx3090"] * 4, nvlink=PAIRS)
    groups = [shape for shape in shapes(LLAMA_8B, four) if len(shape.stages) == 1]
    assert [(shape.tensor_parallel, shape.replica_count) for shape in groups] == [(1, 4), (2, 2), (4, 1)]
    assert [(len(shape.stages), shape.replica_count) for shape in shapes(LLAMA_8B, four, engine=LLAMACPP)] == [
        (1, 4),
        (2, 2),
        (3, 1),
        (4, 1),
    ]


@pytest.mark.parametrize(
    ("count", "stages"),
    [
        (2, []),
        (3, [((0,), (1,), (2,))]),
        (4, [((0,), (1,), (2,))]),
        (6, [((0,), (1,), (4,)), ((0,), (1,), (2,), (3,), (4,)), ((0, 1), (2, 3), (4, 5))]),
    ],
)
def test_cards_that_no_tensors_are_cut_for_take_layers_in_the_widest_groups_there_are(count: int, stages: list[object]) -> None:
    found = shapes(AWQ_32B, box(*["rtx3090"] * count, nvlink=PAIRS[: count // 2] if count > 3 else ()))
    layered = [shape for shape in found if shape.kind is ShapeKind.PIPELINE]
    assert [tuple(stage.card_indices for stage in shape.stages) for shape in layered] == stages
    assert all((shape.stages[0].is_first, shape.stages[-1].is_last, shape.stages[0].is_last) == (True, True, False) for shape in layered)


def test_a_model_that_two_cards_are_too_few_for_runs_on_three_and_the_flags_say_how() -> None:
    report = fit(
        known_architecture("qwen2.5-32b-instruct"),
        [box(*["rtx3090"] * 3)],
        engine_kind=VLLM,
        context_length_tokens=4096,
        sequence_count_wanted=1,
    )
    assert report.best is not None
    assert sum(stage.layer_count for stage in report.best.shape.stages) == 64
    assert flag(report.best.flags, "--pipeline-parallel-size") == "3"
    environment = dict(report.best.flags.environment)
    assert environment["VLLM_PP_LAYER_PARTITION"].count(",") == 2
    # Stages pass their work on over PCIe, where a stock driver refuses the direct way.
    assert environment["NCCL_P2P_DISABLE"] == "1"
    with_peers = answer(known_architecture("qwen2.5-32b-instruct"), box(*["rtx3090"] * 3, peers=True), stages=3)
    assert "NCCL_P2P_DISABLE" not in dict(with_peers.flags.environment)


def test_unlike_groups_are_unlike_shapes() -> None:
    mixed = shapes(LLAMA_8B, box("rtx3090", "rtx3090", "rtx4090", "rtx4090", nvlink=((0, 1),)))
    pairs = {shape.stages[0].cards[0].model.name: shape.stages[0].link.kind for shape in mixed if shape.tensor_parallel == 2}
    assert pairs == {"rtx3090": Link.NVLINK, "rtx4090": Link.HOST}
    assert {shape.stages[0].card_indices for shape in mixed if shape.tensor_parallel == 1} == {(0,), (2,)}


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        (LLAMA_8B, [1, 2, 4, 8, 16, 32]),
        (known_architecture("qwen2.5-32b-instruct"), [1, 2, 4, 8]),
        (known_architecture("smollm2-135m-instruct"), [1, 3]),
    ],
)
def test_a_group_must_divide_the_heads_and_the_feed_forward_layer(architecture: ModelArchitecture, sizes: list[int]) -> None:
    traits = traits_of(VLLM)
    assert [size for size in range(1, 33) if tensor_parallel_divides(architecture, traits, size)] == sizes


def test_several_boxes_are_one_pipeline_with_equally_many_cards_in_each() -> None:
    over = shapes(AWQ_70B, box(*["rtx3090"] * 4, nvlink=PAIRS), box("rtx3090", "rtx3090"))
    assert [(shape.tensor_parallel, len(shape.stages), shape.replica_count) for shape in over] == [(1, 2, 1), (2, 2, 1)]
    assert [stage.is_last for stage in over[0].stages] == [False, True]
    assert shapes(AWQ_70B, box("rtx3090"), box("rtx3090"), engine=LLAMACPP) == []
    processors = [NodeHardware(processor=NodeProcessor(8 * GIB, 40, 8))] * 2
    assert [len(shape.stages) for shape in shapes(AWQ_70B, *processors)] == [2]
    assert shapes(AWQ_70B, NodeHardware()) == []


@pytest.mark.parametrize(
    ("speeds", "capacities", "layers"),
    [
        ([1, 1], [99, 99], (16, 16)),
        ([2, 1], [99, 99], (21, 11)),
        ([3, 1], [20, 99], (20, 12)),
        ([1, 1, 1], [4, 99, 99], (4, 14, 14)),
        ([1, 1], [10, 5], (21, 11)),
        ([1, 1000], [99, 99], (1, 31)),
    ],
)
def test_layers_go_by_speed_within_capacity(speeds: list[float], capacities: list[int], layers: tuple[int, ...]) -> None:
    assert share_layers(32, speeds, capacities) == layers


def test_fewer_layers_than_stages_make_no_pipeline() -> None:
    with pytest.raises(ValueError, match="2 layers cannot make 3 stages"):
        share_layers(2, [1, 1, 1], [9, 9, 9])


def test_a_slower_box_and_a_smaller_box_take_fewer_layers() -> None:
    even = answer(AWQ_32B, box("rtx3090"), box("rtx3090"), stages=2)
    assert [stage.layer_count for stage in even.shape.stages] == [32, 32]
    slower = answer(AWQ_32B, box("rtx3090"), box("rtx3060"), stages=2)
    first, second = (stage.layer_count for stage in slower.shape.stages)
    assert first > second
    small = NodeHardware((NodeCard(RTX3090, memory_usable_bytes=8 * GIB),))
    assert [stage.layer_count for stage in answer(AWQ_32B, box("rtx3090"), small, stages=2).shape.stages][1] < 28


def test_a_single_card_is_told_its_context_its_sequences_and_its_share() -> None:
    flags = answer(AWQ_32B, box("rtx3090")).flags
    assert (flag(flags, "--max-model-len"), flag(flags, "--gpu-memory-utilization")) == ("4096", "0.95")
    assert "--quantization" not in flags.arguments, "vLLM reads it from the files, and picks the fastest kernel unless one is named"
    assert "--tensor-parallel-size" not in flags.arguments
    assert "--disable-custom-all-reduce" not in flags.arguments
    assert flags.environment == (("CUDA_VISIBLE_DEVICES", "0"),)


def test_a_pair_without_a_bridge_is_told_to_leave_peer_to_peer_alone() -> None:
    flags = answer(AWQ_32B, box("rtx3090", "rtx3090"), tensor_parallel=2).flags
    assert flag(flags, "--tensor-parallel-size") == "2"
    assert "--disable-custom-all-reduce" in flags.arguments
    assert ("NCCL_P2P_DISABLE", "1") in flags.environment


@pytest.mark.parametrize("hardware", [box("rtx3090", "rtx3090", nvlink=((0, 1),)), box("rtx3090", "rtx3090", peers=True)])
def test_a_pair_whose_cards_reach_each_other_may_use_everything(hardware: NodeHardware) -> None:
    flags = answer(AWQ_32B, hardware, tensor_parallel=2).flags
    assert "--disable-custom-all-reduce" not in flags.arguments
    assert flags.environment == (("CUDA_VISIBLE_DEVICES", "0,1"),)


def test_two_bridged_pairs_in_one_group_keep_their_bridges() -> None:
    flags = answer(AWQ_70B, box(*["rtx3090"] * 4, nvlink=PAIRS), tensor_parallel=4).flags
    assert "--disable-custom-all-reduce" in flags.arguments
    assert ("NCCL_P2P_LEVEL", "NVL") in flags.environment


def test_four_cards_over_pcie_do_not_use_the_engine_s_own_all_reduce() -> None:
    assert "--disable-custom-all-reduce" in answer(AWQ_70B, box(*["rtx3090"] * 4, peers=True), tensor_parallel=4).flags.arguments


def test_an_older_card_computes_in_half_precision() -> None:
    flags = answer(known_architecture("qwen3-8b-awq"), box("rtx2080ti")).flags
    assert flag(flags, "--dtype") == "half"


def test_a_card_that_others_use_too_is_asked_for_the_rest() -> None:
    half = NodeCard(RTX3090, memory_usable_bytes=RTX3090.memory_bytes // 2)
    found = answer(known_architecture("qwen3-4b"), NodeHardware((half,)))
    # Less what vLLM's own context takes: it asks for its share when that is there already.
    assert flag(found.flags, "--gpu-memory-utilization") == "0.48"
    assert found.memory[0].usable_bytes + CUDA_CONTEXT_BYTES <= half.usable_bytes


def test_a_pipeline_over_boxes_names_its_stages_and_leaves_the_cards_to_each_box() -> None:
    flags = answer(AWQ_70B, box("rtx3090", "rtx3090"), box("rtx3090", "rtx3090"), tensor_parallel=2, stages=2).flags
    assert (flag(flags, "--pipeline-parallel-size"), flag(flags, "--tensor-parallel-size")) == ("2", "2")
    environment = dict(flags.environment)
    assert environment["VLLM_PP_LAYER_PARTITION"] == "40,40"
    assert "CUDA_VISIBLE_DEVICES" not in environment


def test_llamacpp_is_told_the_context_of_each_slot() -> None:
    processor = NodeHardware(processor=NodeProcessor(8 * GIB, 40, 8))
    flags = answer(known_architecture("smollm2-135m-instruct"), processor, engine=LLAMACPP).flags
    assert (flags.arguments, flags.environment) == (("--context", "4096", "--slots", "2"), ())
    own = answer(known_architecture("smollm2-135m-instruct"), box("rtx3090"), engine=LLAMACPP).flags
    assert (flag(own, "--ctx-size"), flag(own, "--parallel"), flag(own, "--n-gpu-layers")) == ("8192", "2", "999")


def test_vllm_on_a_processor_is_told_the_bytes_of_its_cache() -> None:
    hardware = NodeHardware(processor=NodeProcessor(8 * GIB, 40, 8))
    found = answer(replace(known_architecture("qwen3-4b-awq"), context_length_max_tokens=4096), hardware)
    assert flag(found.flags, "--kv-cache-memory-bytes") == str(found.memory[0].kv_wanted_bytes)
    assert "--gpu-memory-utilization" not in found.flags.arguments
