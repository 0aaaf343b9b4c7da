"""gRPC through `grpcio`: everything is learned from server reflection, no generated code of ours."""

import threading

import grpc
import harness
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "switchyard.v1.Inference"


class Inference:
    """The Generate method, built from what reflection says."""

    def __init__(self, address: str):
        self.channel = grpc.insecure_channel(address)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        pool = descriptor_pool.DescriptorPool(self.database)
        method = pool.FindServiceByName(SERVICE).FindMethodByName("Generate")
        assert method.server_streaming and not method.client_streaming
        self.Request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        self.generate = self.channel.unary_stream(
            f"/{SERVICE}/Generate",
            request_serializer=self.Request.SerializeToString,
            response_deserializer=response.FromString,
        )

    def run(self, timeout_s: float = harness.PATIENCE_S, **fields):
        """All messages of one call. `fields` as in GenerateRequest, nested ones as dicts."""
        return list(self.generate(self.Request(**fields), timeout=timeout_s))

    def refused(self, **fields) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as error:
            self.run(**fields)
        return error.value


@pytest.fixture(scope="module")
def inference(tiny):
    stub = Inference(tiny.grpc_address)
    yield stub
    stub.channel.close()


def sampling(**changes) -> dict:
    return {"temperature": 0.0, "max_tokens": 17, "ignore_eos": True, **changes}


def by_choice(messages) -> dict[int, dict]:
    """Text, ids, logprobs and finish reason by choice; checks the order of a call."""
    choices = {}
    for message in messages:
        choice = choices.setdefault(message.index, {"text": "", "ids": [], "logprobs": [], "finish": ""})
        assert not choice["finish"] or not (message.text or message.tokens), "text after finish_reason"
        choice["text"] += message.text
        choice["ids"] += [token.token_id for token in message.tokens]
        choice["logprobs"] += [token.logprob for token in message.tokens if token.HasField("logprob")]
        choice["finish"] = choice["finish"] or message.finish_reason
    assert all(not message.HasField("usage") for message in messages[:-1])
    assert messages[-1].HasField("usage"), "the last message of all carries usage"
    return choices


def test_reflection_lists_the_services(inference):
    assert {SERVICE, "grpc.health.v1.Health"} <= set(inference.database.get_services())


@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_token_prompts_give_the_golden_tokens(inference, case):
    golden = harness.golden("qwen3_moe")["cases"][case]
    messages = inference.run(tokens={"ids": golden["prompt"]}, sampling=sampling(), request_id="golden")
    [choice] = by_choice(messages).values()
    assert choice["ids"] == golden["greedy"] and choice["finish"] == "length"
    assert {message.request_id for message in messages} == {"golden"}
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(golden["prompt"]), 17)


def test_prompt_and_chat_equal_http(inference, tiny):
    text = by_choice(inference.run(prompt="The switchyard", sampling=sampling()))[0]["text"]
    body = {"prompt": "The switchyard", "max_tokens": 17, "temperature": 0, "ignore_eos": True}
    assert text == tiny.post("/v1/completions", body).json()["choices"][0]["text"]
    messages = [{"role": "user", "content": "Hi"}]
    said = by_choice(inference.run(chat={"messages": messages}, sampling=sampling()))[0]["text"]
    body = {"messages": messages, "max_tokens": 17, "temperature": 0, "ignore_eos": True}
    assert said == tiny.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]


def test_n_seed_and_logprobs(inference, tiny):
    """Same seed, same choices, over both protocols; logprobs to the last bit of a float."""
    ask = sampling(temperature=1.0, seed=9, n=3, logprobs=2)
    choices = by_choice(inference.run(prompt="What is", sampling=ask))
    assert sorted(choices) == [0, 1, 2] and len({choice["text"] for choice in choices.values()}) > 1
    assert by_choice(inference.run(prompt="What is", sampling=ask)) == choices
    body = {"prompt": "What is", "max_tokens": 17, "temperature": 1.0, "seed": 9, "n": 3, "logprobs": 2}
    answer = tiny.post("/v1/completions", {**body, "ignore_eos": True}).json()
    for choice in answer["choices"]:
        ours = choices[choice["index"]]
        assert ours["text"] == choice["text"]
        assert ours["logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], rel=1e-6, abs=1e-7)


def test_stop_string(inference):
    whole = by_choice(inference.run(prompt="The", sampling=sampling(max_tokens=40)))[0]["text"]
    stop = whole[9:12]
    cut = by_choice(inference.run(prompt="The", sampling=sampling(max_tokens=40, stop=[stop])))[0]
    assert (cut["text"], cut["finish"]) == (whole[: whole.index(stop)], "stop")


def test_errors(inference):
    def code(**fields):
        error = inference.refused(**fields)
        assert error.details()
        return error.code()

    assert code(prompt="a", model="other") == grpc.StatusCode.NOT_FOUND
    assert code(sampling=sampling()) == grpc.StatusCode.INVALID_ARGUMENT  # no input
    assert code(prompt="") == grpc.StatusCode.INVALID_ARGUMENT
    assert code(tokens={"ids": []}) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(tokens={"ids": [310]}) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(tokens={"ids": [-1]}) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(prompt="a", sampling=sampling(temperature=-1)) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(prompt="a", sampling=sampling(temperature=float("nan"))) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(prompt="a", sampling=sampling(n=0)) == grpc.StatusCode.INVALID_ARGUMENT
    too_long = inference.refused(tokens={"ids": [1] * 600})
    assert too_long.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "600" in too_long.details() and "512" in too_long.details()


def test_garbage_message(inference, tiny):
    raw = inference.channel.unary_stream(f"/{SERVICE}/Generate")
    with pytest.raises(grpc.RpcError) as error:
        list(raw(b"\xff\xff\xff\xff", timeout=harness.PATIENCE_S))
    # UNIMPLEMENTED is what gRPC 1.51 itself answers for a message that its callback API cannot parse.
    assert error.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED)
    assert tiny.get("/health").status == 200


def test_unknown_method(inference):
    call = inference.channel.unary_unary(f"/{SERVICE}/Nothing")
    with pytest.raises(grpc.RpcError) as error:
        call(b"", timeout=harness.PATIENCE_S)
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_health(tiny):
    with grpc.insecure_channel(tiny.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=harness.PATIENCE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=harness.PATIENCE_S)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_cancel_frees_the_request(start_server, long_model):
    server = start_server(long_model, name="cancel")
    stub = Inference(server.grpc_address)
    fields = {"prompt": "Once", "sampling": sampling(max_tokens=60_000)}
    call = stub.generate(stub.Request(**fields), timeout=harness.PATIENCE_S)
    next(call)
    assert server.metrics().value("switchyard_requests_running") == 1
    call.cancel()
    server.wait_idle()
    with pytest.raises(grpc.RpcError) as error:
        stub.run(timeout_s=0.2, **fields)  # a deadline is a cancellation too
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_idle()
    assert server.metrics().value("switchyard_generation_tokens_total") < 60_000
    stub.channel.close()
    assert server.stop() == 0


def test_many_calls_at_once(inference):
    """The same answers as alone, from 16 threads on one channel."""
    prompts = [f"Wagon {i}" for i in range(16)]
    alone = [by_choice(inference.run(prompt=prompt, sampling=sampling())) for prompt in prompts]
    together = [None] * len(prompts)

    def ask(i):
        together[i] = by_choice(inference.run(prompt=prompts[i], sampling=sampling()))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_key_is_wanted(start_server):
    server = start_server(harness.FIXTURES / "qwen3_moe", "--api-key", "secret-1", name="key")
    stub = Inference(server.grpc_address)
    assert stub.refused(prompt="a").code() == grpc.StatusCode.UNAUTHENTICATED
    metadata = (("authorization", "Bearer secret-1"),)
    request = stub.Request(prompt="a", sampling=sampling())
    assert list(stub.generate(request, metadata=metadata, timeout=harness.PATIENCE_S))
    stub.channel.close()
    assert server.stop() == 0
