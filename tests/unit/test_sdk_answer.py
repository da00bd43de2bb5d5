"""Reading answers, choosing models and deciding on retries, without a socket."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import potluck
from potluck import calls, catalogue_calls, explain_calls, tier_calls
from potluck.address import pool_address
from potluck.answer import AnswerReader
from potluck.errors import CLASS_OF_CODE, PoolError, pool_error
from potluck.results import Deployment, ModelInfo
from potluck.retry import RETRY_AFTER_MAX_SECONDS, TRIES_MAX, delay_before_retry_seconds
from potluck_protocol.errors import CATALOGUE, ErrorCode
from potluck_protocol.money import credits_text
from potluck_protocol.v1 import account_pb2, inference_pb2, pool_pb2
from potluck_protocol.values import AccountId, Endpoint, KeyPrefix, ModelId, NodeId, RequestId, TokenId
from tests.support.scripted_pool import data, finished, placed


def chat_event(text: str | None, finish_reason: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "delta": {} if text is None else {"content": text}, "finish_reason": finish_reason}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


def reader(*, stream: bool) -> AnswerReader:
    return AnswerReader(placed().placed, stream=stream)


def model(name: str, ready: int, *endpoints: Endpoint) -> ModelInfo:
    return ModelInfo(ModelId(name), 100, 1, 1, ready, 0, "", endpoints)


def test_public_names_are_exactly_these():
    assert potluck.__all__ == sorted(potluck.__all__)
    errors = {error_class.__name__ for error_class in CLASS_OF_CODE.values()}
    groups = {"PoolError", "CredentialError", "BusyError", "AnswerLostError", "PoolTimeoutError"}
    values = {
        "Client",
        "AsyncClient",
        "ChatStream",
        "AsyncChatStream",
        "ChatResult",
        "ModelInfo",
        "NodeInfo",
        "Credits",
        "Usage",
        "ErrorCode",
    }
    assert set(potluck.__all__) == errors | groups | values
    assert all(hasattr(potluck, name) for name in potluck.__all__)


def test_every_code_has_a_class_of_its_own():
    assert set(CLASS_OF_CODE) == set(ErrorCode)
    assert len(set(CLASS_OF_CODE.values())) == len(CLASS_OF_CODE)


def test_an_error_survives_pickling_with_everything_it_says():
    error = pool_error(ErrorCode.NODE_LOST, "gone", request_id="req_1", retry_after_seconds=2.0)
    error.partial_text = "half"
    error.outcome_unknown = True
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is potluck.NodeLostError
    assert (again.message, again.request_id, again.retry_after_seconds, again.partial_text) == ("gone", "req_1", 2.0, "half")
    assert again.outcome_unknown


def test_every_call_names_a_method_of_the_contract_and_its_reply():
    made = [
        calls.list_models(),
        calls.list_nodes(),
        calls.revoke_node(NodeId("n"), ""),
        calls.set_node_trust(NodeId("n"), trusted=True),
        calls.get_balance(),
        calls.list_statement(1),
        calls.claim_earnings("c"),
        calls.create_key("k"),
        calls.list_keys(),
        calls.revoke_key(KeyPrefix("p")),
        calls.set_key_quotas(KeyPrefix("p"), {}),
        tier_calls.get_tiers(),
        explain_calls.explain_request(RequestId("r")),
        explain_calls.explain_waiting(RequestId("r")),
        explain_calls.explain_node(NodeId("n")),
        calls.create_join_token(),
        calls.list_join_tokens(),
        calls.revoke_join_token(TokenId("t")),
        calls.create_account("a"),
        calls.list_accounts(),
        calls.audit_ledger(),
        catalogue_calls.add_model_text(""),
        catalogue_calls.add_model_from_hub("hf:org/name@main"),
        catalogue_calls.remove_model(ModelId("m")),
        catalogue_calls.get_model(ModelId("m")),
        catalogue_calls.deploy(Deployment(ModelId("m"))),
        catalogue_calls.undeploy(ModelId("m")),
        catalogue_calls.list_deployments(),
        catalogue_calls.explain_deployment(ModelId("m")),
    ]
    methods = {
        f"/{service.full_name}/{method.name}": method
        for module in (account_pb2, inference_pb2, pool_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    for call in made:
        method = methods[call.method]
        assert method.input_type is call.request.DESCRIPTOR
        assert method.output_type is call.reply_type.DESCRIPTOR
    assert {call.method for call in made} == methods.keys() - {calls.GENERATE_METHOD}
    made_once = {call.method.rsplit("/")[-1] for call in made if not call.repeatable}
    assert made_once == {"CreateKey", "CreateJoinToken", "CreateAccount", "RemoveModel"}


@given(texts=st.lists(st.text(min_size=1), max_size=8), cuts=st.lists(st.integers(0, 2000), max_size=10), crlf=st.booleans())
def test_text_is_the_same_however_the_stream_is_cut(texts: list[str], cuts: list[int], crlf: bool):
    whole = b"".join(chat_event(text) for text in texts) + chat_event(None, "stop") + b"data: [DONE]\n\n"
    if crlf:
        whole = whole.replace(b"\n", b"\r\n")
    edges = sorted({0, len(whole), *(cut % (len(whole) + 1) for cut in cuts)})
    answer = reader(stream=True)
    got = [text for start, end in pairwise(edges) for event in data(whole[start:end]) for text in answer.read(event)]
    answer.read(finished())
    result = answer.result()
    assert got == texts
    assert result.text == "".join(texts)
    assert result.finish_reason == "stop"
    assert len(result.raw["events"]) == len(texts) + 1


def test_only_the_first_choice_is_text():
    answer = reader(stream=True)
    assert answer.read(data(chat_event("b", index=1) + chat_event("a"))[0]) == ["a"]


def test_a_whole_answer_is_read_at_its_end():
    body = json.dumps({"choices": [{"index": 0, "message": {"content": "Hallo"}, "finish_reason": "length"}]}).encode()
    answer = reader(stream=False)
    for event in data(body[:7], body[7:]):
        assert answer.read(event) == []
    answer.read(finished(prompt=1, completion=2, charge=9))
    result = answer.result()
    assert (result.text, result.finish_reason, result.charge_micro_credits) == ("Hallo", "length", 9)
    assert (result.usage.prompt_token_count, result.usage.completion_token_count) == (1, 2)
    assert result.raw["choices"][0]["message"]["content"] == "Hallo"


def test_a_plain_completion_and_a_tool_call_are_read_too():
    answer = reader(stream=True)
    assert answer.read(data(b'data: {"choices":[{"index":0,"text":"abc"}]}\n\n')[0]) == ["abc"]
    assert answer.read(data(b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{}]}}]}\n\n')[0]) == []


@pytest.mark.parametrize("bad", [b"data: {oops\n\n", b"data: [1]\n\n", b'data: {"error": {"message": "secret prompt"}}\n\n'])
def test_a_broken_event_is_the_engines_failure_and_keeps_the_text(bad: bytes):
    answer = reader(stream=True)
    answer.read(data(chat_event("so far"))[0])
    with pytest.raises(potluck.EngineFailedError) as caught:
        answer.read(data(bad)[0])
    assert caught.value.partial_text == "so far"
    assert caught.value.request_id == "req_scripted"
    assert "secret" not in str(caught.value)


def test_an_answer_without_its_end_is_not_a_result():
    answer = reader(stream=True)
    answer.read(data(chat_event("half"))[0])
    with pytest.raises(potluck.InternalError) as caught:
        answer.result()
    assert caught.value.partial_text == "half"


def test_the_default_model_is_the_first_ready_one_that_can():
    chat, embed = Endpoint.CHAT_COMPLETIONS, Endpoint.EMBEDDINGS
    assert calls.choose_model([model("a", 1, embed), model("b", 0, chat), model("c", 2, chat)], chat) == "c"
    assert calls.choose_model([model("a", 1, embed), model("b", 0, chat)], chat) == "b"
    with pytest.raises(potluck.ModelNotFoundError):
        calls.choose_model([model("a", 1, embed)], chat)


def test_a_request_leaves_out_what_is_none_and_refuses_what_is_not_json():
    request = calls.generate_request(Endpoint.CHAT_COMPLETIONS, ModelId("m"), {"stop": None, "temperature": 0, "x": "ä"}, stream=False)
    assert json.loads(request.body_json) == {"model": "m", "temperature": 0, "x": "ä"}
    for unwritable in (object(), float("nan"), "\ud800"):
        with pytest.raises(potluck.InvalidRequestError):
            calls.generate_request(Endpoint.CHAT_COMPLETIONS, ModelId("m"), {"x": unwritable}, stream=True)


@given(code=st.sampled_from(list(ErrorCode)), tries=st.integers(1, 5), jitter=st.floats(0, 0.999), after=st.none() | st.floats(0, 100))
def test_retries_only_where_safe_bounded_and_within_the_limit(code: ErrorCode, tries: int, jitter: float, after: float | None):
    error = pool_error(code, retry_after_seconds=after)
    delay = delay_before_retry_seconds(error, tries, 5.0, jitter)
    if delay is None:
        return
    assert CATALOGUE[code].retry_is_safe
    assert tries < TRIES_MAX
    assert 0 <= delay < 5.0
    assert after is None or after <= delay <= after * 1.25


def test_a_safe_failure_is_tried_again_and_a_long_pause_is_not_waited_for():
    busy = pool_error(ErrorCode.QUEUE_FULL)
    assert delay_before_retry_seconds(busy, 1, 60.0, 0.0) == 0.25
    assert delay_before_retry_seconds(busy, 2, 60.0, 0.0) == 0.5
    assert delay_before_retry_seconds(busy, TRIES_MAX, 60.0, 0.0) is None
    long = pool_error(ErrorCode.QUEUE_FULL, retry_after_seconds=RETRY_AFTER_MAX_SECONDS + 1)
    assert delay_before_retry_seconds(long, 1, 600.0, 0.0) is None


def test_the_address_comes_from_arguments_then_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("POTLUCK_URL", raising=False)
    monkeypatch.delenv("POTLUCK_API_KEY", raising=False)
    with pytest.raises(potluck.InvalidRequestError, match="POTLUCK_URL"):
        pool_address()
    for nonsense in ("nonsense", "ftp://pool", "http://", "http://pool:no"):
        with pytest.raises(potluck.InvalidRequestError, match="no URL of a pool"):
            pool_address(nonsense)
    monkeypatch.setenv("POTLUCK_URL", "http://127.0.0.1:1")
    with pytest.raises(potluck.InvalidApiKeyError, match="POTLUCK_API_KEY"):
        pool_address()
    monkeypatch.setenv("POTLUCK_API_KEY", "sk-a\n")
    assert pool_address().api_key == "sk-a"
    assert "sk-b" not in repr(pool_address(api_key="sk-b"))
    for pasted in ("http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1/", " http://127.0.0.1:1/ "):
        assert pool_address(pasted).url == "http://127.0.0.1:1"
    assert pool_address("https://host/pool/v1#pin").url == "https://host/pool#pin"
    with pytest.raises(potluck.InvalidApiKeyError):
        pool_address(api_key="sk b")


def test_credits_are_shown_exactly():
    assert [credits_text(amount) for amount in (0, 1, -1_500_000, 1_000_000_000)] == ["0", "0.000001", "-1.5", "1,000"]


def test_the_root_of_the_tree_is_the_protocols():
    assert issubclass(PoolError, potluck.errors.PotluckError)
    assert issubclass(potluck.PoolTimeoutError, TimeoutError)
    assert AccountId("x") == "x"
