"""What an OpenAI-shaped request body must be before it may cost anything.

Decides which bodies are refused, what admission and the ledger must know of the rest, and the two changes made on the way to the engine:
a streamed request always asks for usage, and the tier is taken out. It must not know models, accounts or sockets. Fields not named here go
to the engine untouched; those named beside OpenAI's own are names by which engines let a caller ask for more or longer answers, or for more
of a node's memory. What answers may be held to is bounded by `grammar_bounds`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw, Struct

from potluck_coordinator.domain.grammar_walk import Steps
from potluck_coordinator.domain.tiers import AskedTier
from potluck_coordinator.gateway.grammar_bounds import ABSENT, TOOL_COUNT_MAX, TOOLS_BYTES_MAX, Guides, check_guides, check_schema
from potluck_coordinator.gateway.inference_request import NO_CALLER, Caller, InferenceRequest
from potluck_protocol.errors import ErrorCode, PotluckError
from potluck_protocol.values import AccountId, Endpoint, ModelId, RequestId

BODY_BYTES_MAX: Final = 4 * 1024 * 1024
ANSWER_COUNT_MAX: Final = 4
STOP_COUNT_MAX: Final = 20
STOP_CHARACTERS_MAX: Final = 1024
WORD_COUNT_MAX: Final = 256
INPUT_COUNT_MAX: Final = 2048
MESSAGE_COUNT_MAX: Final = 2048
"""OpenAI's own bound. A template's time grows faster than its messages: for 4,000 of them llama.cpp needed 0.85 s, for 100,000 minutes."""
LOGIT_BIAS_COUNT_MAX: Final = 1024
LOOK_BACK_TOKENS_MAX: Final = 8192
TOKEN_CHARACTERS_MAX: Final = 128
"""No vocabulary in use has a longer token; the longest are runs of blanks."""

_PATH: Final = re.compile(r"^(?P<text>.*) - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$", re.DOTALL)
_QUOTED_VALUE: Final = re.compile(r"Invalid enum value .*", re.DOTALL)
_MAY_BE_EMPTY: Final = frozenset({"assistant", "function"})
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>[^`]+)`")


_Count: TypeAlias = Annotated[int, Meta(ge=1, le=ANSWER_COUNT_MAX)]
_TokenCount: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_LookBack: TypeAlias = Annotated[int, Meta(ge=-1, le=LOOK_BACK_TOKENS_MAX)]
_Stop: TypeAlias = Annotated[str, Meta(max_length=STOP_CHARACTERS_MAX)]
_Ids: TypeAlias = Annotated[list[int], Meta(max_length=LOGIT_BIAS_COUNT_MAX)]
_Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
_Inputs: TypeAlias = str | Annotated[list[str | int | list[int]], Meta(min_length=1, max_length=BODY_BYTES_MAX)]


class _Part(Struct):
    type: str
    text: str | None = None


class _Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    name: str | None = None


class _Function(Struct):
    name: str
    description: str | None = None
    parameters: Raw = ABSENT


class _Tool(Struct):
    type: str
    function: _Function | None = None
    custom: Raw = ABSENT


class _ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Raw] | None = None
    schema: Raw = ABSENT
    """llama.cpp's, beside `json_object`."""


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _Body(Guides, kw_only=True):
    """What every endpoint shares."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    user: str | None = None
    service_tier: Literal["auto", "default", "flex"] | None = None


class _Generation(_Body, kw_only=True):
    """What chat and plain completions share."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    max_tokens: _TokenCount | None = None
    max_completion_tokens: _TokenCount | None = None
    n_predict: _TokenCount | None = None
    """llama.cpp's name for it, which wins over the others there."""
    n: _Count | None = None
    n_cmpl: _Count | None = None
    """llama.cpp's name for `n`, which wins there."""
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=STOP_COUNT_MAX)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=LOGIT_BIAS_COUNT_MAX)] | None = None
    n_probs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """llama.cpp's name for `top_logprobs`."""
    repeat_last_n: _LookBack | None = None
    """llama.cpp's, as the next two: it keeps as many tokens as it is told, gigabytes of them."""
    dry_penalty_last_n: _LookBack | None = None
    min_keep: Annotated[int, Meta(ge=0, le=LOOK_BACK_TOKENS_MAX)] | None = None
    response_format: _ResponseFormat | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """vLLM's, as the next four; -1 asks for every token of the vocabulary, of every token of the prompt."""
    bad_words: Annotated[list[_Stop], Meta(max_length=WORD_COUNT_MAX)] | None = None
    stop_token_ids: _Ids | None = None
    allowed_token_ids: _Ids | None = None
    chat_template: None = None
    """Refused: a program that the engine would run."""
    dry_sequence_breakers: Annotated[list[_Stop], Meta(max_length=WORD_COUNT_MAX)] | None = None
    """llama.cpp's, as the next one."""
    samplers: str | Annotated[list[str], Meta(max_length=WORD_COUNT_MAX)] | None = None


class _ChatBody(_Generation, kw_only=True):
    messages: Annotated[list[_Message], Meta(min_length=1, max_length=MESSAGE_COUNT_MAX)]
    tools: Annotated[list[_Tool], Meta(max_length=TOOL_COUNT_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    """vLLM's."""


class _CompletionBody(_Generation, kw_only=True):
    prompt: _Inputs
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    suffix: Literal[""] | None = None
    """This one and the next two are refused: the engines would leave them out in silence."""
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None


class _EmbeddingBody(_Body, kw_only=True):
    input: _Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None


_Parsed: TypeAlias = _ChatBody | _CompletionBody | _EmbeddingBody

_DECODERS: Final[
    dict[Endpoint, msgspec.json.Decoder[_ChatBody] | msgspec.json.Decoder[_CompletionBody] | msgspec.json.Decoder[_EmbeddingBody]]
] = {
    Endpoint.CHAT_COMPLETIONS: msgspec.json.Decoder(_ChatBody),
    Endpoint.COMPLETIONS: msgspec.json.Decoder(_CompletionBody),
    Endpoint.EMBEDDINGS: msgspec.json.Decoder(_EmbeddingBody),
}
_fields_decoder: Final = msgspec.json.Decoder(dict[str, Raw])
_encoder: Final = msgspec.json.Encoder()


def parse_request(
    endpoint: Endpoint, body: bytes, request_id: RequestId, account_id: AccountId, caller: Caller = NO_CALLER, *, trusted_only: bool = False
) -> InferenceRequest:
    """Checks a request body and reads from it what the gateway needs; `trusted_only` is said beside it.

    Raises:
        PotluckError: REQUEST_TOO_LARGE over `BODY_BYTES_MAX`; else INVALID_REQUEST, with `param` naming the field at fault.
    """
    if len(body) > BODY_BYTES_MAX:
        raise too_large()
    parsed = _decode(endpoint, body)
    _check_meaning(parsed)
    model_id = ModelId(parsed.model)
    prompt_bytes = len(body)
    asked_tier = AskedTier(parsed.service_tier or AskedTier.AUTO)
    body = _for_engine(body, asks_for_usage=not isinstance(parsed, _EmbeddingBody) and parsed.stream is True, parsed=parsed)
    if isinstance(parsed, _EmbeddingBody):
        input_count = _check_inputs(parsed.input, "input")
        return InferenceRequest(
            request_id,
            account_id,
            model_id,
            endpoint,
            body,
            stream=False,
            include_usage=False,
            prompt_bytes=prompt_bytes,
            completion_tokens_max=0,
            answer_count=1,
            prompt_count=input_count,
            prompt_tokens_min=_prompt_tokens_min(parsed),
            caller=caller,
            asked_tier=asked_tier,
            trusted_only=trusted_only,
        )
    stream = parsed.stream is True
    return InferenceRequest(
        request_id=request_id,
        account_id=account_id,
        model_id=model_id,
        endpoint=endpoint,
        body=body,
        stream=stream,
        include_usage=stream and parsed.stream_options is not None and parsed.stream_options.include_usage is True,
        prompt_bytes=prompt_bytes,
        completion_tokens_max=_completion_tokens_max(parsed),
        answer_count=_answer_count(parsed),
        prompt_count=_check_inputs(parsed.prompt, "prompt") if isinstance(parsed, _CompletionBody) else 1,
        prompt_tokens_min=_prompt_tokens_min(parsed),
        caller=caller,
        asked_tier=asked_tier,
        trusted_only=trusted_only,
    )


def too_large() -> PotluckError:
    """The refusal of a body over the bound; also raised while a body is still arriving."""
    return PotluckError(ErrorCode.REQUEST_TOO_LARGE, f"The request body is larger than {BODY_BYTES_MAX} bytes. Send a shorter one.")


def _decode(endpoint: Endpoint, body: bytes) -> _Parsed:
    if not body.strip():
        raise PotluckError(ErrorCode.INVALID_REQUEST, "The request has no body; send a JSON object.")
    try:
        return _DECODERS[endpoint].decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except msgspec.DecodeError as error:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"The body is not a JSON document: {error}.") from None
    except UnicodeDecodeError:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "The body is not UTF-8.") from None
    except RecursionError:
        raise PotluckError(ErrorCode.INVALID_REQUEST, "The body's JSON is nested too deeply.") from None


def _invalid_field(explanation: str) -> PotluckError:
    """A finding of msgspec as ours: the path becomes `param`, and no value of the body is repeated."""
    found = _PATH.match(explanation)
    text, path = (found["text"], found["path"]) if found is not None else (explanation, "")
    missing = _MISSING.match(text)
    if missing is not None:
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return PotluckError(ErrorCode.INVALID_REQUEST, f"`{param}` is missing.", param=param)
    text = _QUOTED_VALUE.sub("Not one of the values allowed here", text)
    place = f" for `{path}`" if path else ""
    return PotluckError(ErrorCode.INVALID_REQUEST, f"Wrong value{place}: {text}.", param=path or None)


def _check_meaning(parsed: _Parsed) -> None:
    """What types cannot say."""
    steps = Steps()
    check_guides(parsed, steps)
    if not isinstance(parsed, _EmbeddingBody):
        _check_response_format(parsed.response_format, steps)
    if isinstance(parsed, _ChatBody):
        if parsed.include_reasoning is False:
            # A node is paid for what its client gets.
            words = "`include_reasoning: false` is not supported: what is generated is sent."
            raise PotluckError(ErrorCode.INVALID_REQUEST, words, param="include_reasoning")
        _check_tools(parsed.tools or [], steps)
        for index, message in enumerate(parsed.messages):
            if message.content is None and message.role not in _MAY_BE_EMPTY:
                param = f"messages[{index}].content"
                raise PotluckError(ErrorCode.INVALID_REQUEST, f"`{param}` is missing.", param=param)
    elif isinstance(parsed, _CompletionBody):
        if parsed.echo:
            raise PotluckError(
                ErrorCode.INVALID_REQUEST, "`echo` is not supported: put the prompt before the answer yourself.", param="echo"
            )
        if (parsed.best_of or 1) > (parsed.n or 1):
            raise PotluckError(ErrorCode.INVALID_REQUEST, "`best_of` above `n` is not supported.", param="best_of")


def _check_response_format(response_format: _ResponseFormat | None, steps: Steps) -> None:
    if response_format is None:
        return
    schema = (response_format.json_schema or {}).get("schema", ABSENT)
    check_schema(schema, "response_format.json_schema.schema", steps)
    check_schema(response_format.schema, "response_format.schema", steps)


def _check_tools(tools: list[_Tool], steps: Steps) -> None:
    """An engine makes a grammar of them, and they stand in the prompt, too."""
    functions = [tool.function or _Function("") for tool in tools]
    size_bytes = sum(len(function.description or "") + len(bytes(function.parameters)) for function in functions)
    size_bytes += sum(len(bytes(tool.custom)) for tool in tools)
    if size_bytes > TOOLS_BYTES_MAX:
        message = f"`tools` has more than {TOOLS_BYTES_MAX} bytes of descriptions and parameters."
        raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="tools")
    for index, (tool, function) in enumerate(zip(tools, functions, strict=True)):
        check_schema(function.parameters, f"tools[{index}].function.parameters", steps)
        check_schema(tool.custom, f"tools[{index}].custom", steps)


def _prompt_tokens_min(parsed: _Parsed) -> int:
    """The fewest tokens that the longest prompt can have."""
    if isinstance(parsed, _ChatBody):
        return len(parsed.messages) + sum(_characters(message.content) for message in parsed.messages) // TOKEN_CHARACTERS_MAX
    inputs = parsed.input if isinstance(parsed, _EmbeddingBody) else parsed.prompt
    if isinstance(inputs, str) or all(isinstance(item, int) for item in inputs):
        return _input_tokens_min(inputs)
    return max(_input_tokens_min(item) for item in inputs if not isinstance(item, int))


def _input_tokens_min(item: str | list[Any]) -> int:
    return len(item) // TOKEN_CHARACTERS_MAX if isinstance(item, str) else len(item)


def _characters(content: str | list[_Part] | None) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(part.text or "") for part in content or ())


def _check_inputs(inputs: str | list[str | int | list[int]], param: str) -> int:
    """How many prompts a `prompt` or `input` is: one text, one list of token ids, or a list of either."""
    if isinstance(inputs, str):
        return 1
    kinds = {type(item) for item in inputs}
    if len(kinds) != 1:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"The items of `{param}` must all be of one type.", param=param)
    if kinds == {int}:
        return 1
    if len(inputs) > INPUT_COUNT_MAX:
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"`{param}` has more than {INPUT_COUNT_MAX} items.", param=param)
    if [] in inputs:
        empty = f"{param}[{inputs.index([])}]"
        raise PotluckError(ErrorCode.INVALID_REQUEST, f"`{empty}` is empty: a prompt has a token at least.", param=empty)
    return len(inputs)


def _completion_tokens_max(parsed: _Generation) -> int | None:
    """The largest of the bounds given: engines differ in which of two wins, and a hold must cover either."""
    given = [bound for bound in (parsed.max_completion_tokens, parsed.max_tokens, parsed.n_predict) if bound is not None]
    return max(given, default=None)


def _answer_count(parsed: _ChatBody | _CompletionBody) -> int:
    count = max(parsed.n or 1, parsed.n_cmpl or 1)
    if isinstance(parsed, _CompletionBody):
        count *= _check_inputs(parsed.prompt, "prompt")
        if count > ANSWER_COUNT_MAX:
            message = f"`prompt` and `n` together ask for {count} answers; at most {ANSWER_COUNT_MAX} go into one request."
            raise PotluckError(ErrorCode.INVALID_REQUEST, message, param="prompt")
    return count


def _for_engine(body: bytes, *, parsed: _Parsed, asks_for_usage: bool) -> bytes:
    """The body with `stream_options.include_usage` true where it streams, and without `service_tier`, which is between client and pool.

    Every other value is copied as it stands; a body in which there is nothing to change is passed on as it came.
    """
    if not asks_for_usage and parsed.service_tier is None:
        return body
    fields = _fields_decoder.decode(body)
    is_changed = fields.pop("service_tier", None) is not None
    if asks_for_usage:
        options: dict[str, Raw] = {}
        if "stream_options" in fields and bytes(fields["stream_options"]) != b"null":
            options = _fields_decoder.decode(fields["stream_options"])
        if bytes(options.get("include_usage", b"")) != b"true":
            is_changed = True
            options["include_usage"] = Raw(b"true")
            fields["stream_options"] = Raw(_encoder.encode(options))
    return _encoder.encode(fields) if is_changed else body
