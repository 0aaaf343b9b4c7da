"""The demo model answers its evaluation set through the running server, and the worker counts change nothing."""

import json

import harness

ITEMS = harness.DEMO / "eval.jsonl"


def items() -> list[dict]:
    return [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]


def answers(server) -> list[str]:
    return [
        server.post("/v1/chat/completions", {"messages": item["messages"], "temperature": 0, "max_tokens": 64}).json()[
            "choices"
        ][0]["message"]["content"]
        for item in items()[::5]
    ]


def test_the_set_is_what_it_promises():
    lines = items()
    assert len(lines) >= 200 and len({item["domain"] for item in lines}) >= 4
    assert all(set(item) == {"domain", "messages", "answer"} for item in lines)
    assert len({json.dumps(item["messages"]) for item in lines}) == len(lines), "an item twice"


def test_scores_with_1x1_and_2x3_workers(start_server, tmp_path):
    scores, texts = [], []
    for attention, expert in ((1, 1), (2, 3)):
        flags = ("--attention-workers", attention, "--expert-workers", expert)
        with start_server(harness.DEMO, *flags, name=f"{attention}x{expert}") as server:
            done = harness.run_cli("eval", "--url", server.url, "--items", ITEMS, "--json", timeout_s=400)
            assert done.returncode == 0, done.stderr
            scores.append(json.loads(done.stdout))
            texts.append(answers(server))
    print(json.dumps(scores[0]))
    assert texts[0] == texts[1]
    assert scores[0] == scores[1]
    overall = scores[0]["overall"]
    assert (overall["accuracy"] if isinstance(overall, dict) else overall) >= 0.9


def test_one_item_streams_the_right_answer(start_server):
    """README's first command, streaming too."""
    with start_server(harness.DEMO, name="stream") as server:
        right = 0
        for item in items()[:20]:
            body = {"messages": item["messages"], "temperature": 0, "max_tokens": 64, "stream": True}
            chunks = list(server.open_stream("/v1/chat/completions", body).chunks())
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
            right += text.strip() == item["answer"].strip()
        assert right >= 15


def test_eval_against_nobody_is_one_clear_error():
    done = harness.run_cli("eval", "--url", "http://127.0.0.1:9", "--items", ITEMS)
    assert done.returncode not in (0, -6, -11) and done.stdout == ""
    assert "127.0.0.1:9" in done.stderr
