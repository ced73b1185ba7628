"""Both sides of gRPC: `serve PORT`, or `ask ADDRESS`, which prints `ok` when every answer was right."""

import queue
import sys
from concurrent import futures

import grpc

RAW = dict(request_deserializer=None, response_serializer=None)


def echo(request, context):
    return request


def count(request, context):
    for number in range(int(request)):
        yield b"%d" % number


def add(requests, context):
    return b"%d" % sum(len(request) for request in requests)


def chat(requests, context):
    for request in requests:
        yield request


def fail(request, context):
    context.abort(grpc.StatusCode.NOT_FOUND, "as asked")


def serve(port):
    server = grpc.server(futures.ThreadPoolExecutor(8))
    methods = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo, **RAW),
        "Count": grpc.unary_stream_rpc_method_handler(count, **RAW),
        "Add": grpc.stream_unary_rpc_method_handler(add, **RAW),
        "Chat": grpc.stream_stream_rpc_method_handler(chat, **RAW),
        "Fail": grpc.unary_unary_rpc_method_handler(fail, **RAW),
    }
    handler = grpc.method_handlers_generic_handler("test.Talk", methods)
    server.add_generic_rpc_handlers((handler,))
    assert server.add_insecure_port("[::]:%s" % port), "cannot listen"
    server.start()
    server.wait_for_termination()


def ask(address):
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        large = bytes(range(256)) * 4096
        assert channel.unary_unary("/test.Talk/Echo")(large, timeout=120) == large
        numbers = channel.unary_stream("/test.Talk/Count")(b"1000", timeout=120)
        assert list(numbers) == [b"%d" % number for number in range(1000)]
        parts = (b"x" * size for size in range(200))
        assert channel.stream_unary("/test.Talk/Add")(parts, timeout=120) == b"19900"

        # Each message only after the answer to the one before: both directions are open at once.
        said = []
        turns = queue.Queue()
        turns.put(0)

        def talk():
            while (number := turns.get(timeout=120)) is not None:
                yield b"%d" % number

        for answer in channel.stream_stream("/test.Talk/Chat")(talk(), timeout=120):
            said.append(answer)
            turns.put(len(said) if len(said) < 50 else None)
        assert said == [b"%d" % number for number in range(50)], said
        try:
            channel.unary_unary("/test.Talk/Fail")(b"", timeout=120)
            raise AssertionError("a refusal was expected")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
            assert error.details() == "as asked", error
    print("ok")


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](sys.argv[2])
