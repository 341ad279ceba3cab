"""Calls a service of the mesh by plain xDS, as any Python program with grpcio does.

Usage: client.py TARGET COUNT. Messages are written by hand: field 1 is a string in both.
"""
import collections
import sys

import grpc

METHOD = "/inlay.examples.v1.Greeter/Hello"


def encode(text):
    raw = text.encode()
    return b"\x0a" + bytes([len(raw)]) + raw


def decode(raw):
    assert raw[:1] == b"\x0a", raw
    return raw[2:2 + raw[1]].decode()


def main():
    target, count = sys.argv[1], int(sys.argv[2])
    answers = collections.Counter()
    with grpc.insecure_channel(target) as channel:
        hello = channel.unary_unary(METHOD, request_serializer=encode, response_deserializer=decode)
        for _ in range(count):
            answers[hello("python", timeout=20)] += 1
    for text, n in sorted(answers.items()):
        print(text, n)


if __name__ == "__main__":
    main()
