"""A Python program that makes the calls it is told to, one line each, and answers each with a line
of JSON. The words are those of clients_test.go."""
import json
import socket
import sys
import time


def text(address):
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def call(op, net, host, port):
    kind = socket.SOCK_STREAM if op == "tcp" else socket.SOCK_DGRAM
    family = {"4": socket.AF_INET, "any": socket.AF_UNSPEC}.get(net, socket.AF_INET6)
    flags = socket.AI_V4MAPPED if net == "mapped" else 0
    try:
        family, _, _, _, to = socket.getaddrinfo(host, port, family, kind, 0, flags)[0]
    except socket.gaierror as e:
        return {"fault": f"getaddrinfo: {e.args[1]}"}
    began = time.monotonic_ns()
    with socket.socket(family, kind) as s:
        s.settimeout(2)
        try:
            if op == "udp":
                s.sendto(b"ask", to)
                said, peer = s.recvfrom(4096)
                took = time.monotonic_ns() - began
            else:
                s.connect(to)
                took = time.monotonic_ns() - began
                peer = s.getpeername()
                if op == "tcp":
                    s.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    said = b""
                    while got := s.recv(4096):
                        said += got
                    said = said.partition(b"\r\n\r\n")[2]
                else:
                    s.send(b"ask")
                    said = s.recv(4096)
        except OSError as e:
            errno = 110 if isinstance(e, TimeoutError) and e.errno is None else e.errno
            return {"errno": errno, "nanos": time.monotonic_ns() - began}
        return {"text": said.decode().strip(), "peer": text(peer), "local": text(s.getsockname()), "nanos": took}


for line in sys.stdin:
    print(json.dumps(call(*line.split())), flush=True)
