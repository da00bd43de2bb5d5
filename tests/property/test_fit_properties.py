"""What must hold of the fit for every model, card and wish: more room never harms, rates stay below the roofline, flags say the shape."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from statistics import median

from hypothesis import given
from hypothesis import strategies as st

from potluck_coordinator.domain.fit.architecture import GIB, UNQUANTIZED, ModelArchitecture, Quantization
from potluck_coordinator.domain.fit.cards import CARD_MODELS
from potluck_coordinator.domain.fit.corrections import (
    NOTHING_LEARNED,
    RATIO_BOUNDS,
    RATIO_STEP,
    CorrectionKey,
    Measure,
    Observation,
    learn,
)
from potluck_coordinator.domain.fit.engines import ENGINES, LLAMACPP, VLLM, traits_of
from potluck_coordinator.domain.fit.fitting import fit
from potluck_coordinator.domain.fit.hardware import BoxLink, NodeCard, NodeHardware, NodeProcessor
from potluck_coordinator.domain.fit.layers import share_layers
from potluck_coordinator.domain.fit.load import Load
from potluck_coordinator.domain.fit.quantizations import known_quantizations, quantization_named
from potluck_coordinator.domain.fit.rates import rates_of
from potluck_coordinator.domain.fit.report import FitReport, ShapeFit, Verdict

KEY = CorrectionKey("rtx3090", "vllm 0.33", "model", "awq")
NODES = "abcdefghijklmnop"
ROUNDING_MAX = RATIO_STEP / 2 + 1e-9
"""Corrections apply in whole steps."""


@st.composite
def architectures(draw: st.DrawFn) -> ModelArchitecture:
    """Of 0.1 to some hundred billion weights, dense or with experts."""
    kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16]))
    heads = kv_heads * draw(st.integers(1, 8))
    layers = draw(st.integers(2, 96))
    sliding = draw(st.integers(0, layers))
    expert_count = draw(st.sampled_from([0, 0, 8, 32, 128]))
    return ModelArchitecture(
        model_id="drawn",
        layer_count=layers,
        hidden_size=128 * draw(st.integers(4, 64)),
        attention_head_count=heads,
        kv_head_count=kv_heads,
        head_dim=draw(st.sampled_from([64, 128, 256])),
        intermediate_size=256 * draw(st.integers(2, 100)),
        vocabulary_size=draw(st.integers(1000, 262_144)),
        context_length_max_tokens=10**6,
        expert_count=expert_count,
        experts_per_token=draw(st.integers(1, expert_count)) if expert_count else 0,
        tie_word_embeddings=draw(st.booleans()),
        sliding_layer_count=sliding,
        sliding_window_tokens=draw(st.integers(1, 8192)) if sliding else 0,
        linear_attention_layer_count=draw(st.integers(0, layers - sliding)),
        key_equals_value=draw(st.booleans()),
        quantization=draw(st.sampled_from([UNQUANTIZED, *map(quantization_named, known_quantizations())])),
    )


@st.composite
def boxes(draw: st.DrawFn, *, cards_max: int = 6) -> NodeHardware:
    """Of cards that need not be alike, some of them bridged; or of a processor."""
    if draw(st.integers(0, 9)) == 0:
        return NodeHardware(processor=NodeProcessor(draw(st.integers(1, 256)) * GIB, draw(st.floats(5, 500)), draw(st.integers(1, 64))))
    cards = tuple(draw(st.lists(node_cards(), min_size=1, max_size=cards_max)))
    pairs = tuple((first, first + 1) for first in range(0, len(cards) - 1, 2) if draw(st.booleans()))
    peers = tuple(pair for pair in combinations(range(len(cards)), 2) if draw(st.booleans())) if draw(st.booleans()) else ()
    return NodeHardware(cards, nvlink_pairs=pairs, pcie_peer_pairs=peers)


def node_cards() -> st.SearchStrategy[NodeCard]:
    return st.builds(
        NodeCard,
        model=st.sampled_from(list(CARD_MODELS.values())),
        memory_usable_bytes=st.none() | st.integers(0, 80 * GIB),
        power_limit_watts=st.none() | st.integers(50, 800),
        pcie_width=st.sampled_from([1, 4, 8, 16]),
        pcie_generation=st.integers(2, 5),
    )


engines = st.sampled_from(list(ENGINES))
contexts = st.integers(1, 200_000)
sequence_counts = st.integers(1, 40)


def answer(
    architecture: ModelArchitecture, *hardware: NodeHardware, engine: str = VLLM, context: int = 4096, sequences: int = 2
) -> FitReport:
    return fit(
        architecture, hardware, engine_kind=engine, context_length_tokens=context, sequence_count_wanted=sequences, link=BoxLink(1, 10)
    )


def fits(found: ShapeFit) -> bool:
    """Whether the shape has room, chosen or not."""
    return found.verdict is not Verdict.DOES_NOT_FIT


def by_shape(report: FitReport) -> dict[tuple[object, ...], ShapeFit]:
    return {(found.shape.tensor_parallel, len(found.shape.stages), found.shape.stages[0].card_indices): found for found in report.shapes}


@given(architectures(), boxes(), engines, contexts, sequence_counts)
def test_rates_are_positive_and_below_the_roofline(
    architecture: ModelArchitecture, box: NodeHardware, engine: str, context: int, sequences: int
) -> None:
    load = Load(traits_of(engine), context, sequences)
    for found in answer(architecture, box, engine=engine, context=context, sequences=sequences).shapes:
        # Asked without corrections, which would cut off what lies above.
        rates = rates_of(architecture, found.shape, load, sequences, BoxLink())
        assert 0 < rates.prefill <= rates.roofline_prefill
        assert 0 < rates.decode_single <= rates.roofline_single
        assert 0 < rates.decode_batched <= rates.roofline_batched
        assert found.kv_capacity_tokens >= 0


@given(architectures(), boxes(), engines, contexts, sequence_counts)
def test_what_runs_holds_the_wish_on_every_card_and_what_does_not_says_why(
    architecture: ModelArchitecture, box: NodeHardware, engine: str, context: int, sequences: int
) -> None:
    report = answer(architecture, box, engine=engine, context=context, sequences=sequences)
    for found in report.shapes:
        assert found.reason
        assert fits(found) == (found.sequences_at_context >= sequences and all(card.spare_bytes >= 0 for card in found.memory))
        assert all(card.needed_bytes == card.weight_bytes + card.overhead_bytes + card.kv_wanted_bytes for card in found.memory)
    best = report.best
    assert (best is not None) == any(fits(found) for found in report.shapes)
    assert report.verdict is (best.verdict if best else Verdict.DOES_NOT_FIT)


@given(architectures(), boxes(cards_max=4), engines, contexts, st.integers(0, 40))
def test_more_memory_never_makes_a_shape_fit_worse(
    architecture: ModelArchitecture, box: NodeHardware, engine: str, context: int, more_gib: int
) -> None:
    bigger = replace(box, cards=tuple(_bigger(card, more_gib) for card in box.cards), processor=_bigger_processor(box.processor, more_gib))
    after = by_shape(answer(architecture, bigger, engine=engine, context=context))
    for key, found in by_shape(answer(architecture, box, engine=engine, context=context)).items():
        if key in after:  # cards that became alike are one shape now
            assert fits(after[key]) or not fits(found)
            assert len(found.shape.stages) > 1 or after[key].kv_capacity_tokens >= found.kv_capacity_tokens


def _bigger(card: NodeCard, more_gib: int) -> NodeCard:
    usable = None if card.memory_usable_bytes is None else card.memory_usable_bytes + more_gib * GIB
    return replace(card, model=replace(card.model, memory_gib=card.model.memory_gib + more_gib), memory_usable_bytes=usable)


def _bigger_processor(processor: NodeProcessor | None, more_gib: int) -> NodeProcessor | None:
    return processor and replace(processor, memory_budget_bytes=processor.memory_budget_bytes + more_gib * GIB)


@given(architectures(), boxes(cards_max=4), engines, contexts, st.integers(0, 100_000), sequence_counts, st.integers(0, 8))
def test_a_longer_context_and_more_sequences_never_fit_better(
    architecture: ModelArchitecture, box: NodeHardware, engine: str, context: int, longer: int, sequences: int, more: int
) -> None:
    less = by_shape(answer(architecture, box, engine=engine, context=context, sequences=sequences))
    for key, found in by_shape(answer(architecture, box, engine=engine, context=context + longer, sequences=sequences + more)).items():
        assert fits(less[key]) or not fits(found)
        assert len(found.shape.stages) > 1 or found.memory[0].needed_bytes >= less[key].memory[0].needed_bytes


@given(architectures(), boxes(cards_max=4), engines, st.floats(1, 32), st.floats(0, 16))
def test_more_bits_a_weight_never_fit_better_and_never_answer_faster(
    architecture: ModelArchitecture, box: NodeHardware, engine: str, bits: float, more: float
) -> None:
    few, many = (
        by_shape(answer(replace(architecture, quantization=Quantization("drawn", min(32, size))), box, engine=engine))
        for size in (bits, bits + more)
    )
    for key, found in many.items():
        assert fits(few[key]) or not fits(found)
        if len(found.shape.stages) == 1:
            assert found.memory[0].weight_bytes >= few[key].memory[0].weight_bytes
            # llama.cpp multiplies whole half-precision weights while it reads them, and others after: the two are compared apart.
            if engine == VLLM:
                assert found.rates.decode_single <= few[key].rates.decode_single * (1 + 1e-9)


@given(architectures(), node_cards(), st.integers(1, 5), engines, contexts)
def test_more_cards_never_make_the_same_shape_fit_worse(
    architecture: ModelArchitecture, card: NodeCard, count: int, engine: str, context: int
) -> None:
    after = by_shape(answer(architecture, NodeHardware((card,) * (count + 1)), engine=engine, context=context))
    for key, found in by_shape(answer(architecture, NodeHardware((card,) * count), engine=engine, context=context)).items():
        assert fits(after[key]) == fits(found)
        assert after[key].rates == found.rates
        assert after[key].shape.replica_count >= found.shape.replica_count


@given(architectures(), node_cards(), st.sampled_from([2, 4]), contexts)
def test_a_wider_group_holds_less_of_the_model_on_each_card(
    architecture: ModelArchitecture, card: NodeCard, count: int, context: int
) -> None:
    found = by_shape(answer(architecture, NodeHardware((card,) * count), context=context))
    widths = sorted(
        (key[0], answered.memory[0].weight_bytes + answered.memory[0].kv_wanted_bytes) for key, answered in found.items() if key[1] == 1
    )
    assert [size for _, size in widths] == sorted((size for _, size in widths), reverse=True)


@st.composite
def boxes_in_two_orders(draw: st.DrawFn) -> tuple[NodeHardware, NodeHardware]:
    """The same cards twice, counted otherwise; bridged in pairs or all to all; all, some or none pass data on to each other over PCIe."""
    drawn = draw(st.lists(node_cards(), min_size=1, max_size=3))
    cards = draw(st.lists(st.sampled_from(drawn), min_size=1, max_size=7))
    every = list(combinations(range(len(cards)), 2))
    joined = [pair for pair in zip(range(0, len(cards) - 1, 2), range(1, len(cards), 2), strict=True) if draw(st.booleans())]
    bridges = every if draw(st.integers(0, 3)) == 0 else joined
    some = [pair for pair in every if draw(st.booleans())]
    peers = draw(st.sampled_from([every, some, []]))
    places = draw(st.permutations(range(len(cards))))
    moved = NodeHardware(
        tuple(cards[place] for place in places),
        nvlink_pairs=tuple((places.index(first), places.index(second)) for first, second in bridges),
        pcie_peer_pairs=tuple((places.index(first), places.index(second)) for first, second in peers),
    )
    return NodeHardware(tuple(cards), nvlink_pairs=tuple(bridges), pcie_peer_pairs=tuple(peers)), moved


@given(architectures(), boxes_in_two_orders(), engines, contexts, sequence_counts)
def test_the_answer_does_not_depend_on_the_order_of_the_cards(
    architecture: ModelArchitecture, twice: tuple[NodeHardware, NodeHardware], engine: str, context: int, sequences: int
) -> None:
    one, other = (answer(architecture, box, engine=engine, context=context, sequences=sequences) for box in twice)
    assert (one.verdict, one.reason) == (other.verdict, other.reason)
    said = [
        sorted((found.shape.label, found.verdict, found.reason, found.kv_capacity_tokens, found.total_decode) for found in report.shapes)
        for report in (one, other)
    ]
    assert said[0] == said[1]


@given(architectures(), boxes(), engines)
def test_every_replica_that_is_claimed_has_its_cards_and_as_many_are_claimed_as_there_are(
    architecture: ModelArchitecture, box: NodeHardware, engine: str
) -> None:
    there = Counter((card.model.name, card.usable_bytes // GIB) for card in box.cards)
    taken: dict[int, Counter[tuple[str, int]]] = {}
    for found in answer(architecture, box, engine=engine).shapes:
        cards = [card for stage in found.shape.stages for card in stage.cards]
        claimed = taken.setdefault(len(cards), Counter())
        claimed.update([(card.model.name, card.usable_bytes // GIB) for card in cards] * found.shape.replica_count)
    for count, claimed in taken.items():
        assert claimed <= there
        assert claimed.total() == (len(box.cards) // count * count if count else 0)


@given(architectures(), boxes(), engines, st.integers(1, 8192), sequence_counts)
def test_the_flags_say_the_shape_and_the_wish(
    architecture: ModelArchitecture, box: NodeHardware, engine: str, context: int, sequences: int
) -> None:
    for found in answer(architecture, box, engine=engine, context=context, sequences=sequences).shapes:
        said = dict(zip(found.flags.arguments, (*found.flags.arguments[1:], ""), strict=True))
        environment = dict(found.flags.environment)
        indices = [index for stage in found.shape.stages for index in stage.card_indices]
        assert environment.get("CUDA_VISIBLE_DEVICES", "") == ",".join(map(str, indices))
        if engine == LLAMACPP:
            told = (int(said["--ctx-size"]), said["--parallel"]) if indices else (sequences * int(said["--context"]), said["--slots"])
            assert told == (context * sequences, str(sequences))
            continue
        assert (said["--max-model-len"], int(said["--max-num-seqs"]) >= sequences) == (str(context), True)
        assert int(said.get("--tensor-parallel-size", 1)) == found.shape.tensor_parallel == max(1, len(found.shape.stages[0].cards))
        assert int(said.get("--pipeline-parallel-size", 1)) == len(found.shape.stages)
        if indices:
            assert 0 <= float(said["--gpu-memory-utilization"]) <= 0.95


@given(architectures(), st.lists(boxes(cards_max=2), min_size=2, max_size=4))
def test_a_pipeline_over_boxes_has_every_layer_once(architecture: ModelArchitecture, group: list[NodeHardware]) -> None:
    for found in answer(architecture, *group).shapes:
        layers = [stage.layer_count for stage in found.shape.stages]
        assert sum(layers) == architecture.layer_count
        assert min(layers) >= 1
        assert [stage.box_index for stage in found.shape.stages] == list(range(len(group)))
        assert {len(stage.cards) for stage in found.shape.stages} == {len(found.shape.stages[0].cards)}


@given(st.integers(1, 200), st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 120)), min_size=1, max_size=8))
def test_layers_are_shared_out_whole_and_within_capacity_where_that_suffices(layer_count: int, stages: list[tuple[float, int]]) -> None:
    speeds, capacities = [speed for speed, _ in stages], [capacity for _, capacity in stages]
    if layer_count < len(stages):
        return
    layers = share_layers(layer_count, speeds, capacities)
    assert sum(layers) == layer_count
    assert min(layers) >= 1
    if sum(max(1, capacity) for capacity in capacities) >= layer_count:
        assert all(count <= max(1, capacity) for count, capacity in zip(layers, capacities, strict=True))


@given(st.sampled_from(Measure), st.lists(st.tuples(st.sampled_from(NODES), st.floats(1e-6, 1e12)), max_size=60))
def test_a_correction_stays_within_its_bounds_whatever_is_said(measure: Measure, said: list[tuple[str, float]]) -> None:
    corrections = NOTHING_LEARNED
    for node, observed in said:
        corrections = learn(corrections, Observation(KEY, node, measure, observed, 1000))
    lowest, highest = RATIO_BOUNDS[measure]
    assert lowest <= corrections.of(KEY, measure).ratio <= highest


@given(
    st.sampled_from(Measure),
    st.lists(st.floats(0.9, 1.1), min_size=3, max_size=15),
    st.floats(1e-6, 1e12),
    st.integers(1, 50),
)
def test_one_liar_moves_a_correction_no_further_than_honest_nodes_differ(
    measure: Measure, honest: list[float], lie: float, times: int
) -> None:
    corrections = NOTHING_LEARNED
    for node, ratio in zip(NODES, honest, strict=False):
        corrections = learn(corrections, Observation(KEY, node, measure, ratio, 1))
    for _ in range(times):
        corrections = learn(corrections, Observation(KEY, "liar", measure, lie, 1))
    middle = corrections.of(KEY, measure).ratio
    assert min(1, *honest) - ROUNDING_MAX <= middle <= max(1, *honest) + ROUNDING_MAX


@given(architectures(), node_cards(), st.lists(st.floats(0.6, 1.6), min_size=1, max_size=5))
def test_observed_rates_draw_the_prediction_towards_them(architecture: ModelArchitecture, card: NodeCard, ratios: list[float]) -> None:
    hardware = NodeHardware((card,))
    before = answer(architecture, hardware).shapes[0]
    corrections = NOTHING_LEARNED
    key = CorrectionKey(card.model.name, VLLM, architecture.model_id, architecture.quantization.name)
    for node, ratio in zip(NODES, ratios, strict=False):
        corrections = learn(corrections, Observation(key, node, Measure.PREFILL, ratio * before.rates.prefill, before.rates.prefill))
    after = fit(
        architecture, [hardware], engine_kind=VLLM, context_length_tokens=4096, sequence_count_wanted=2, corrections=corrections
    ).shapes[0]
    wanted = median(ratios) - 1
    moved = after.rates.prefill / before.rates.prefill - 1
    assert moved * wanted >= -1e-9
    assert abs(moved) <= abs(wanted) + ROUNDING_MAX
