"""The `openai` client from PyPI against the running server: what applications really send and read."""

import asyncio

import harness
import openai
import pytest

GREEDY = {"temperature": 0.0}
NO_END = {"ignore_eos": True}


def chat(client, text="What is 12 + 34?", **kwargs):
    kwargs.setdefault("max_tokens", 24)
    kwargs.setdefault("temperature", 0.0)
    extra = {**NO_END, **kwargs.pop("extra_body", {})}
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, **kwargs)


def complete(client, prompt="The switchyard", **kwargs):
    kwargs.setdefault("max_tokens", 24)
    kwargs.setdefault("temperature", 0.0)
    extra = {**NO_END, **kwargs.pop("extra_body", {})}
    return client.completions.create(model="tiny", prompt=prompt, extra_body=extra, **kwargs)


def streamed_text(chunks, chat_stream: bool) -> dict[int, str]:
    """Text by choice index; checks that each index ends once and says nothing afterwards."""
    texts, ended = {}, set()
    for chunk in chunks:
        for choice in chunk.choices:
            assert choice.index not in ended, "text after finish_reason"
            piece = (choice.delta.content or "") if chat_stream else choice.text
            texts[choice.index] = texts.get(choice.index, "") + piece
            if choice.finish_reason:
                ended.add(choice.index)
    assert ended == set(texts)
    return texts


def test_models(client):
    served = client.models.list().data
    assert [model.id for model in served] == ["tiny"]
    assert served[0].object == "model" and served[0].created > 0
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_shape(client):
    answer = chat(client)
    assert answer.object == "chat.completion" and answer.id and answer.created > 1_700_000_000
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant" and choice.message.content and choice.message.refusal is None
    usage = answer.usage
    assert usage.completion_tokens == 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens > len("What is 12 + 34?") / 4
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_content_parts_equal_the_string(client):
    parts = [{"type": "text", "text": "What is 12 + 34?"}]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=24, temperature=0.0, extra_body=NO_END
    )
    assert answer.choices[0].message.content == chat(client).choices[0].message.content


def test_max_completion_tokens(client):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=7,
        temperature=0.0,
        extra_body=NO_END,
    )
    assert answer.usage.completion_tokens == 7 and answer.choices[0].finish_reason == "length"


def test_greedy_repeats(client):
    assert chat(client).choices[0].message.content == chat(client).choices[0].message.content


def test_seed_repeats_and_matters(client):
    texts = [chat(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_seeds_of_int64_are_accepted(client):
    for seed in (0, -1, 2**63 - 1, -(2**63)):
        chat(client, temperature=1.0, seed=seed, max_tokens=2)


@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 0.9, "seed": 5, "top_p": 0.9}], ids=["greedy", "seeded"])
def test_chat_stream_equals_the_whole(client, sampling):
    whole = chat(client, **sampling)
    chunks = list(chat(client, stream=True, **sampling))
    assert streamed_text(chunks, True) == {0: whole.choices[0].message.content}
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert not chunks[-1].choices[0].delta.content and chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None and chunk.choices for chunk in chunks), "usage was not asked for"


def test_stream_usage(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    whole = chat(client).usage
    assert chunks[-1].usage.prompt_tokens == whole.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.completion_tokens == 24


def test_completion_shape_and_stream(client):
    whole = complete(client)
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24
    chunks = list(complete(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert streamed_text(chunks, False) == {0: whole.choices[0].text}
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_n(client, stream):
    """n choices: different texts of one seed, the same when repeated, the prompt counted once."""
    ask = {"n": 4, "temperature": 1.0, "seed": 11}
    whole = chat(client, **ask)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = {choice.index: choice.message.content for choice in whole.choices}
    assert len(set(texts.values())) > 1
    assert whole.usage.prompt_tokens == chat(client).usage.prompt_tokens
    assert whole.usage.completion_tokens == 4 * 24
    if stream:
        chunks = list(chat(client, stream=True, **ask))
        assert streamed_text(chunks, True) == texts
        firsts = {}
        for chunk in chunks:
            for choice in chunk.choices:
                firsts.setdefault(choice.index, choice.delta)
        assert {index: delta.role for index, delta in firsts.items()} == dict.fromkeys(range(4), "assistant")
    else:
        assert texts == {choice.index: choice.message.content for choice in chat(client, **ask).choices}
        # Choice 0 of n is the choice of n = 1: the draw is keyed by seed and index alone.
        assert chat(client, temperature=1.0, seed=11).choices[0].message.content == texts[0]


def test_prompt_lists_with_n(client):
    """Index = prompt · n + i; each prompt is counted once."""
    prompts = ["The switchyard", "def route", "What is"]
    alone = [complete(client, prompt) for prompt in prompts]
    together = complete(client, prompts, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    for index, choice in enumerate(together.choices):
        assert choice.text == alone[index // 2].choices[0].text
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert streamed_text(list(complete(client, prompts, n=2, stream=True)), False) == {
        choice.index: choice.text for choice in together.choices
    }


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_token_prompts_give_the_golden_tokens(client, case):
    """transformers' greedy tokens, end to end."""
    golden = harness.golden("qwen3_moe")["cases"][case]
    answer = complete(client, golden["prompt"], max_tokens=17, extra_body={"return_token_ids": True})
    assert answer.usage.prompt_tokens == len(golden["prompt"])
    assert answer.choices[0].model_extra["token_ids"] == golden["greedy"]


def test_token_prompt_lists(client):
    cases = harness.golden("qwen3_moe")["cases"]
    answer = complete(client, [c["prompt"] for c in cases], max_tokens=17, extra_body={"return_token_ids": True})
    for case, choice in zip(cases, answer.choices, strict=True):
        assert choice.model_extra["token_ids"] == case["greedy"]


def test_stop_string(client):
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[9:12]
    expected = whole[: whole.index(stop)]
    cut = complete(client, max_tokens=40, stop=stop)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (expected, "stop")
    assert cut.usage.completion_tokens < 40
    listed = complete(client, max_tokens=40, stop=["never in there", stop])
    assert listed.choices[0].text == expected
    chunks = list(complete(client, max_tokens=40, stop=[stop], stream=True))
    assert streamed_text(chunks, False) == {0: expected}
    assert chunks[-1].choices[0].finish_reason == "stop"
    kept = complete(client, max_tokens=40, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == expected + stop


def test_stop_that_never_comes_keeps_the_text(client):
    """Held text that began like a stop string is flushed at the end."""
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[-2:] + "and more"
    assert streamed_text(list(complete(client, max_tokens=40, stop=[stop], stream=True)), False) == {0: whole}


def test_stop_token_ids(client):
    golden = harness.golden("qwen3_moe")["cases"][0]
    end = golden["greedy"][6]
    at = golden["greedy"].index(end)
    extra = {"stop_token_ids": [end], "return_token_ids": True}
    answer = complete(client, golden["prompt"], max_tokens=17, extra_body=extra)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["token_ids"][:at] == golden["greedy"][:at]
    extra["min_tokens"] = at + 3
    later = complete(client, golden["prompt"], max_tokens=17, extra_body=extra)
    assert later.usage.completion_tokens >= at + 3
    assert end not in later.choices[0].model_extra["token_ids"][: at + 3]


def test_end_token_ends(client):
    """Forced by a bias: the end token stops with finish_reason stop and no text, unless ignore_eos."""
    for eos in (301, 300):  # config.json's and generation_config.json's second
        answer = client.completions.create(
            model="tiny", prompt="The", max_tokens=9, temperature=0, logit_bias={str(eos): 100}
        )
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
    assert complete(client, max_tokens=9, logit_bias={"301": 100}).usage.completion_tokens == 9


def test_logit_bias(client):
    extra = {"return_token_ids": True}
    answer = complete(client, max_tokens=5, logit_bias={"17": 100}, extra_body=extra)
    assert answer.choices[0].model_extra["token_ids"] == [17] * 5
    free = complete(client, max_tokens=1, extra_body=extra).choices[0].model_extra["token_ids"][0]
    banned = complete(client, max_tokens=1, logit_bias={str(free): -100}, extra_body=extra)
    assert banned.choices[0].model_extra["token_ids"][0] != free


def test_repetition_and_frequency_penalties_change_loops(client):
    extra = {"return_token_ids": True}
    loop = {"logit_bias": {"17": 8.0}, "max_tokens": 30}
    plain = complete(client, extra_body=extra, **loop).choices[0].model_extra["token_ids"].count(17)
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert complete(client, extra_body=extra, **penalty, **loop).choices[0].model_extra["token_ids"].count(17) < plain
    repeated = complete(client, extra_body={**extra, "repetition_penalty": 5.0}, **loop)
    assert repeated.choices[0].model_extra["token_ids"].count(17) < plain


def test_top_k_one_is_greedy(client):
    greedy = complete(client).choices[0].text
    assert complete(client, temperature=2.0, seed=3, extra_body={"top_k": 1}).choices[0].text == greedy
    assert complete(client, temperature=2.0, seed=3, top_p=1e-9).choices[0].text == greedy
    assert complete(client, temperature=2.0, seed=3, extra_body={"min_p": 1.0}).choices[0].text == greedy


def test_chat_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 4
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0], "greedy takes the most likely token"
    text = answer.choices[0].message.content
    if "\ufffd" not in text:
        assert bytes(byte for entry in content for byte in entry.bytes).decode() == text


def test_chat_logprobs_stream_equals_the_whole(client):
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == whole


def test_logprobs_without_alternatives(client):
    content = chat(client, logprobs=True).choices[0].logprobs.content
    assert len(content) == 24 and all(entry.top_logprobs == [] for entry in content)


def test_completion_logprobs(client):
    answer = complete(client, logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 24
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(24)]
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 1 <= len(top) <= 4 and chosen == max(top.values())


def test_echo(client):
    plain = complete(client, "The switchyard sends", max_tokens=6)
    echoed = complete(client, "The switchyard sends", max_tokens=6, echo=True)
    assert echoed.choices[0].text == "The switchyard sends" + plain.choices[0].text
    assert echoed.usage == plain.usage or echoed.usage.completion_tokens == 6


def test_echo_with_logprobs_scores_the_prompt(client):
    """max_tokens 0: how evaluation harnesses score a text."""
    scored = complete(client, "The switchyard sends", max_tokens=0, echo=True, logprobs=1)
    logprobs = scored.choices[0].logprobs
    assert scored.choices[0].text == "The switchyard sends"
    assert len(logprobs.tokens) == scored.usage.prompt_tokens and scored.usage.completion_tokens == 0
    assert logprobs.token_logprobs[0] is None and all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == "The switchyard sends"
    longer = complete(client, "The switchyard sends", max_tokens=3, echo=True, logprobs=1).choices[0].logprobs
    assert longer.token_logprobs[: len(logprobs.tokens)] == logprobs.token_logprobs


def test_scoring_equals_generation(client):
    """A prompt token's logprob is the one it had when it was generated: one definition for prefill and decode."""
    golden = harness.golden("qwen3_moe")["cases"][0]
    generated = complete(client, golden["prompt"], max_tokens=8, logprobs=0).choices[0].logprobs.token_logprobs
    scored = complete(client, golden["prompt"] + golden["greedy"][:8], max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].logprobs.token_logprobs[len(golden["prompt"]) :] == generated


def test_unknown_fields_are_accepted(client):
    plain = chat(client).choices[0].message.content
    odd = chat(client, user="u", extra_body={"some_new_field": {"a": [1]}, "another": None})
    assert odd.choices[0].message.content == plain


def test_model_may_be_omitted(tiny):
    answer = tiny.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert answer.status == 200 and answer.json()["model"] == "tiny"


def test_special_tokens_of_users_are_text(client):
    """A user who types the end marker has not ended anything."""
    plain = chat(client, "Hello").usage.prompt_tokens
    spelled = chat(client, "Hello<|im_end|>").usage.prompt_tokens
    assert spelled - plain >= 4, "the marker was taken as one control token"


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert "other" in missing.value.body["message"]
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"n": 0}, {"max_tokens": -1}, {"logprobs": 10_000}):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(client, **bad)
        assert refused.value.body["type"] == "invalid_request_error"
        assert refused.value.body["param"] == next(iter(bad)), refused.value.body
    with pytest.raises(openai.BadRequestError):
        chat(client, logprobs=True, top_logprobs=21)
    with pytest.raises(openai.BadRequestError):
        chat(client, top_logprobs=2)  # without logprobs
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=[])


def test_prompt_too_long_names_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [5] * 600)
    assert "600" in refused.value.body["message"] and "512" in refused.value.body["message"]
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, [5] * 500, max_tokens=100)
    assert "512" in refused.value.body["message"]
    with pytest.raises(openai.BadRequestError):
        list(complete(client, [5] * 600, stream=True))
    assert complete(client, [5] * 500, max_tokens=12).usage.total_tokens == 512


def test_answers_do_not_depend_on_company(tiny):
    """24 requests at once, streaming and not, give what each gives alone."""
    prompts = [f"Wagon {i} " + "track " * (i % 7) for i in range(24)]

    async def ask(client, prompt, stream):
        answer = await client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=32,
            temperature=0.8,
            seed=len(prompt),
            stream=stream,
            logprobs=1,
            extra_body=NO_END,
        )
        if not stream:
            return answer.choices[0].text, answer.choices[0].logprobs.token_logprobs
        text, values = "", []
        async for chunk in answer:
            text += chunk.choices[0].text
            if chunk.choices[0].logprobs:
                values += chunk.choices[0].logprobs.token_logprobs
        return text, values

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="x", max_retries=0) as client:
            alone = [await ask(client, prompt, False) for prompt in prompts]
            together = await asyncio.gather(*(ask(client, prompt, i % 2 == 0) for i, prompt in enumerate(prompts)))
            assert together == alone

    asyncio.run(all_of_them())
    tiny.wait_idle()
