"""A network that fails on command, in front of an HTTP server: python fault_proxy.py --upstream HOST:PORT --log FILE

Prints its port and that of its control. A process of its own: sockets of a thread in the tests would be inherited by
forked loader workers, and stay open. The head of a request goes on as it came, so that a signature over it holds.

Control: POST /rules with ``{"seed": 0, "rules": [...]}`` (see Rule), GET /report.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

PIECE = 16 << 10
CODES = {
    400: "ExpiredToken",
    403: "AccessDenied",
    404: "NoSuchKey",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass
class Rule:
    """What happens to a request.

    ``latency`` (value: seconds before the server gets it) and ``bandwidth`` (bytes per second of the answer's body)
    come together with others; of ``status`` (value: the code), ``reset``, ``cut``, ``corrupt`` and ``hang`` (seconds)
    the first rule that fits decides. The last four let ``after`` of the body (a fraction) through before; without
    it, ``reset`` and ``hang`` come before the answer.
    """

    fault: str
    value: float = 0.0
    methods: tuple[str, ...] = ()  # none: all
    path: str = ""  # a regular expression that the path and the query contain
    probability: float = 1.0
    times: int | None = None
    after: float | None = None


class Request:
    def __init__(self, head: bytes) -> None:
        self.head = head
        lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = lines[0].split(" ", 2)
        self.fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
        self.fields = {name.lower(): value for name, value in self.fields.items()}

    def forwarded(self) -> bytes:
        dropped = re.compile(rb"(?im)^(connection|expect):[^\r\n]*\r\n")
        return dropped.sub(b"", self.head)[:-2] + b"Connection: close\r\n\r\n"


class Proxy:
    def __init__(self, host: str, port: int, log: TextIO) -> None:
        self._upstream, self._log = (host, port), log
        self.set_rules({"seed": 0, "rules": []})

    def set_rules(self, body: dict[str, Any]) -> None:
        self._seed, self._rules = body["seed"], [Rule(**rule) for rule in body["rules"]]
        self._left = [rule.times for rule in self._rules]
        self._seen: Counter[tuple[int, str]] = Counter()
        self._faults: Counter[str] = Counter()
        self._requests = self._bytes = 0

    def report(self) -> dict[str, Any]:
        return {"requests": self._requests, "bytes": self._bytes, "faults": dict(self._faults)}

    def _rules_for(self, request: Request) -> list[Rule]:
        found, decided = [], False
        for number, rule in enumerate(self._rules):
            fits = (not rule.methods or request.method in rule.methods) and re.search(rule.path, request.path)
            beside = rule.fault in ("latency", "bandwidth")
            if not fits or self._left[number] == 0 or (decided and not beside):
                continue
            place = f"{request.method} {request.path.partition('?')[0]}"
            self._seen[number, place] += 1
            # Of the request alone, not of the order in which several clients come.
            draw = random.Random(f"{self._seed} {number} {place} {self._seen[number, place]}").random()
            if draw < rule.probability:
                self._left[number] = None if self._left[number] is None else self._left[number] - 1
                self._faults[rule.fault] += 1
                decided |= not beside
                found.append(rule)
        return found

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, BrokenPipeError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the client may send another request on this connection."""
        request = Request(await reader.readuntil(b"\r\n\r\n"))
        if "expect" in request.fields:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(request.fields.get("content-length", 0)))
        rules, began = self._rules_for(request), time.time()
        self._requests += 1
        entry = {"method": request.method, "path": request.path, "range": request.fields.get("range")}
        entry |= {"faults": [rule.fault for rule in rules], "received": len(body), "sent": 0, "status": None}
        try:
            return await self._answer(request, body, rules, writer, entry)
        finally:
            self._bytes += int(entry["sent"])
            entry |= {"at": round(began, 4), "seconds": round(time.time() - began, 4)}
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()

    async def _answer(
        self, request: Request, body: bytes, rules: list[Rule], writer: asyncio.StreamWriter, entry: dict[str, Any]
    ) -> bool:
        fault = next((rule for rule in rules if rule.fault not in ("latency", "bandwidth")), None)
        await asyncio.sleep(sum(rule.value for rule in rules if rule.fault == "latency"))
        if fault and fault.fault == "status":
            return await self._refuse(request, int(fault.value), writer, entry)
        if fault and fault.after is None and fault.fault in ("reset", "hang"):
            return await self._break(fault, writer)
        server, to_server = await asyncio.open_connection(*self._upstream)
        try:
            to_server.write(request.forwarded() + body)
            head = await server.readuntil(b"\r\n\r\n")
            answer = re.sub(rb"(?im)^connection:[^\r\n]*\r\n", b"", head)
            entry["status"] = int(answer.split(b" ", 2)[1])
            writer.write(answer)
            length = re.search(rb"(?im)^content-length: *(\d+)", head)
            size = int(length[1]) if length else None
            if request.method == "HEAD" or entry["status"] in (204, 304):
                size = 0
            pace = min((rule.value for rule in rules if rule.fault == "bandwidth"), default=0.0)
            whole = await self._pass_on(server, writer, size, pace, fault, entry)
            return whole and (size is not None or b"chunked" in head.lower())
        finally:
            to_server.close()

    async def _pass_on(
        self,
        server: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        size: int | None,
        pace: float,
        fault: Rule | None,
        entry: dict[str, Any],
    ) -> bool:
        """Whether the body went through whole."""
        stop = int((size or 0) * (fault.after if fault.after is not None else 0.5)) if fault and size else None
        while size is None or entry["sent"] < size:
            piece = await server.read(PIECE)
            if not piece:
                break
            if fault and stop is not None and entry["sent"] + len(piece) > stop:
                at = stop - entry["sent"]
                if fault.fault != "corrupt":
                    writer.write(piece[:at])
                    entry["sent"] += at
                    await writer.drain()
                    return await self._break(fault, writer)
                piece = piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
                stop = None
            writer.write(piece)
            entry["sent"] += len(piece)
            await writer.drain()
            if pace:
                await asyncio.sleep(len(piece) / pace)
        return True

    async def _refuse(self, request: Request, code: int, writer: asyncio.StreamWriter, entry: dict[str, Any]) -> bool:
        text = f"<Error><Code>{CODES[code]}</Code><Message>the proxy says so</Message></Error>"
        body = b"" if request.method == "HEAD" else f'<?xml version="1.0"?>{text}'.encode()
        head = f"HTTP/1.1 {code} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        entry |= {"status": code, "sent": len(body)}
        return True

    async def _break(self, fault: Rule, writer: asyncio.StreamWriter) -> bool:
        if fault.fault == "hang":
            await asyncio.sleep(fault.value)
        if fault.fault == "reset":
            line = writer.get_extra_info("socket")
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort() if fault.fault == "reset" else writer.close()
        return False

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = Request(await reader.readuntil(b"\r\n\r\n"))
        body = await reader.readexactly(int(request.fields.get("content-length", 0)))
        if request.path == "/rules":
            self.set_rules(json.loads(body))
        answer = json.dumps(self.report()).encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n".encode() + answer)
        await writer.drain()
        writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--log", required=True, metavar="FILE", help="a line of JSON for every request")
    args = parser.parse_args()
    host, _, port = args.upstream.partition(":")
    with open(args.log, "a", encoding="utf-8") as log:
        proxy = Proxy(host, int(port), log)
        servers = [await asyncio.start_server(serve, "127.0.0.1", 0) for serve in (proxy.serve, proxy.control)]
        print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
        await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main())
