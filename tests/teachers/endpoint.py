"""A double of an endpoint with OpenAI's API and of Anthropic's batches: real HTTP on this machine, made-up answers, and a count
of what it bills.

It writes a text that follows from the last message, in the tokens of a real tokenizer, each with a distribution that follows
from its place. A test changes answers (`change`) or whole responses (`fault`), and reads what was asked and billed.
"""

import http.server
import json
import math
import random
import re
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

END = 2


class Endpoint:
    """What it has been asked, what it has billed, and how it answers.

    Attributes:
        most: alternatives that it gives at most.
        unknown: parameters that it refuses.
        with_end: whether the end token has an entry.
        fault: given the number of a call and its path, a status with headers and a body to send instead; or "cut", "reset".
        change: changes an answer before it is sent.
        delay: seconds that a batch takes.
        lost: whether a request of a batch gets no answer, by its number; for Anthropic's also "expired" or "canceled".
    """

    def __init__(self, tokenizer: Any, most: int = 20) -> None:
        self.tokenizer, self.most = tokenizer, most
        self.unknown: set[str] = set()
        self.with_end = False
        self.fault: Callable[[int, str], Any] = lambda number, path: None
        self.change: Callable[[dict[str, Any], dict[str, Any]], Any] = lambda answer, body: answer
        self.headers: Callable[[int], dict[str, str]] = lambda number: {}
        self.logprobs = True
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.billed: Counter[str] = Counter()
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.delay = 0.3
        self.losses: dict[str, set[str]] = {}
        self.lost: Callable[[str], Any] = lambda custom_id: False
        self.keys: set[str] = set()
        self.lock = threading.Lock()

    def text(self, body: dict[str, Any]) -> str:
        """The answer to a request."""
        return f"You said “{body['messages'][-1]['content']}” — naïve 🦙."

    def refusal(self, body: dict[str, Any]) -> str | None:
        """Why a body is not taken."""
        if named := sorted(self.unknown & body.keys()):
            return f"Unrecognized request arguments supplied: {', '.join(named)}"
        if not self.logprobs and body.get("logprobs"):
            return "logprobs are not supported with this model"
        if (body.get("top_logprobs") or 0) > self.most:
            return f"Invalid value for 'top_logprobs': must be less than or equal to {self.most}."
        return None

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of the answer to a body."""
        ids = self.tokenizer.encode(self.text(body), add_special_tokens=False)
        cut = ids[: body["max_tokens"]]
        reason = "length" if len(cut) < len(ids) or len(ids) == body["max_tokens"] else "stop"
        shown = [*cut, END] if self.with_end and reason == "stop" else cut
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": self.tokenizer.decode(cut), "refusal": None},
            "finish_reason": reason,
            "logprobs": None,
        }
        if body.get("logprobs"):
            entries = [self.entry(token, place, body.get("top_logprobs") or 0) for place, token in enumerate(shown)]
            choice["logprobs"] = {"content": entries}
        prompt = 10 * len(body["messages"])
        return {"choices": [choice], "usage": {"prompt_tokens": prompt, "completion_tokens": len(cut), "total_tokens": 0}}

    def entry(self, token: int, place: int, top: int) -> dict[str, Any]:
        """A token with what else might have stood there; `distribution` is what it says."""
        others = [{**self.named(other), "logprob": value} for other, value in distribution(token, place, top)]
        return {**self.named(token), "logprob": distribution(token, place, 1)[0][1], "top_logprobs": others}

    def named(self, token: int) -> dict[str, Any]:
        """A token's string and bytes, as OpenAI gives them."""
        if token == END:
            return {"token": "<|im_end|>", "bytes": list(b"<|im_end|>")}
        content = token_content(self.tokenizer, token)
        return {"token": content.decode("utf-8", errors="replace"), "bytes": list(content)}


def distribution(token: int, place: int, count: int) -> list[tuple[int, float]]:
    """The `count` most likely tokens where `token` was written as the first of them, with their log-probabilities."""
    ids = [token, *(100 + (place * 31 + number * 7) % 1000 for number in range(3 * count))]
    ids = list(dict.fromkeys(ids))[:count]
    return [(other, math.log(0.5 * 0.4**number)) for number, other in enumerate(ids)]


def token_content(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token of byte-level BPE, by transformers' own table and not by what is tested."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: value for value, character in bytes_to_unicode().items()}
    return bytes(byte_of[character] for character in tokenizer.convert_ids_to_tokens(token))


@contextmanager
def serving(endpoint: Endpoint):
    """The address of an endpoint while it is there."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.handle_call(b"")

        def do_POST(self):
            self.handle_call(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def handle_call(self, content):
            path = self.path.removeprefix("/v1").partition("?")[0]
            if endpoint.keys and self.headers.get("Authorization", "").removeprefix("Bearer ") not in endpoint.keys:
                return self.send(401, {"error": {"message": "Incorrect API key provided"}})
            with endpoint.lock:
                number = len(endpoint.times)
                endpoint.times.append(time.monotonic())
            fault = endpoint.fault(number, path)
            if fault == "reset":
                self.close_connection = True
                return self.connection.close()
            if fault not in (None, "cut"):
                status, headers, body = fault
                return self.send(status, body, headers)
            status, answer = self.answer_to(path, content)
            return self.send(status, answer, endpoint.headers(number), cut=fault == "cut")

        def answer_to(self, path, content):
            if path == "/chat/completions":
                body = json.loads(content)
                with endpoint.lock:
                    endpoint.bodies.append(body)
                if said := endpoint.refusal(body):
                    return 400, {"error": {"message": said}}
                endpoint.billed[json.dumps(body["messages"])] += 1
                return 200, endpoint.change(endpoint.answer(body), body)
            if path == "/files":
                # multipart: the JSONL is the part with a file name
                boundary = re.search(r"boundary=(.+)", self.headers["Content-Type"])[1].encode()
                part = next(part for part in content.split(b"--" + boundary) if b"filename=" in part)
                name = f"file-{len(endpoint.files)}"
                endpoint.files[name] = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n").decode()
                return 200, {"id": name, "object": "file", "bytes": 1, "created_at": 0, "filename": "x", "purpose": "batch"}
            if found := re.fullmatch(r"/files/([\w-]+)/content", path):
                return 200, endpoint.files[found[1]]
            if path.startswith("/messages/batches"):
                return message_batches(endpoint, self.command, self.path.removeprefix("/v1/messages/batches"), content)
            if path == "/batches" and self.command == "POST":
                return 200, new_batch(endpoint, json.loads(content))
            if path == "/batches":
                return 200, {"object": "list", "data": list(endpoint.batches.values())[::-1], "has_more": False}
            return 200, looked_at(endpoint, path.rpartition("/")[2])

        def send(self, status, body, headers=None, cut=False):
            content = (body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)).encode()
            try:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if cut else content)
            except (BrokenPipeError, ConnectionResetError):
                pass
            if cut:
                self.close_connection = True

        def log_message(self, *arguments):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # a client that was killed

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def new_batch(endpoint: Endpoint, asked: dict[str, Any]) -> dict[str, Any]:
    """Take a batch in, and bill each of its rows."""
    with endpoint.lock:
        name = f"batch-{len(endpoint.batches)}"
        batch = {**asked, "id": name, "object": "batch", "status": "in_progress", "created_at": time.time()}
        endpoint.batches[name] = batch
        rows = [json.loads(line)["custom_id"] for line in filter(None, endpoint.files[asked["input_file_id"]].split("\n"))]
        endpoint.losses[name] = {row for row in rows if endpoint.lost(row)}
        endpoint.billed.update(row for row in rows if row not in endpoint.losses[name])
        return batch


def looked_at(endpoint: Endpoint, name: str) -> dict[str, Any]:
    """A batch, which has ended after a while, its results shuffled, and lost rows in the file of errors."""
    batch = endpoint.batches[name]
    with endpoint.lock:
        if batch["status"] == "in_progress" and time.time() > batch["created_at"] + endpoint.delay:
            good, bad = [], []
            for line in filter(None, endpoint.files[batch["input_file_id"]].split("\n")):
                row = json.loads(line)
                if row["custom_id"] in endpoint.losses[name]:
                    error = {"status_code": 500, "body": {"error": {"code": "server_error"}}}
                    bad.append({"custom_id": row["custom_id"], "response": error, "error": None})
                else:
                    body = endpoint.change(endpoint.answer(row["body"]), row["body"])
                    good.append({"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}, "error": None})
            random.Random(name).shuffle(good)
            for key, lines in (("output_file_id", good), ("error_file_id", bad)):
                endpoint.files[f"{name}-{key}"] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                batch[key] = f"{name}-{key}" if lines else None
            batch["status"] = "completed"
    return batch


def message_batches(endpoint: Endpoint, command: str, path: str, content: bytes) -> tuple[int, Any]:
    """Anthropic's calls: one that creates a batch, a list in pages of two, one batch, and its results, in any order."""
    name, _, query = path.strip("/").partition("?")
    if command == "POST":
        return new_message_batch(endpoint, json.loads(content)["requests"])
    with endpoint.lock:
        everything = {identity: seen(batch, endpoint) for identity, batch in reversed(endpoint.batches.items())}
    if name.endswith("/results"):
        identity = name.removesuffix("/results")
        lines = [message_result(endpoint, identity, request) for request in endpoint.batches[identity]["requests"]]
        random.Random(identity).shuffle(lines)
        return 200, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if name:
        return 200, everything[name]
    order = list(everything)
    after = urllib.parse.parse_qs(query).get("after_id")
    rest = order[order.index(after[0]) + 1 :] if after else order
    page = rest[:2]
    ends = {"first_id": page[0], "last_id": page[-1]} if page else {"first_id": None, "last_id": None}
    return 200, {"data": [everything[identity] for identity in page], "has_more": len(rest) > 2, **ends}


def new_message_batch(endpoint: Endpoint, requests: list[dict[str, Any]], delay: float | None = None) -> tuple[int, Any]:
    """Take a batch in, and bill each of its rows that will have an answer; `delay` is its own, if it has one."""
    names = [request["custom_id"] for request in requests]
    if len(set(names)) < len(names) or not all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) for name in names):
        return 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "custom_id"}}
    with endpoint.lock:
        identity = f"msgbatch_{len(endpoint.batches)}"
        endpoint.batches[identity] = {"id": identity, "requests": requests, "created": time.time(), "delay": delay, "losses": {}}
        losses = {name: kind for name in names if (kind := endpoint.lost(name.rpartition("-")[2]))}
        endpoint.batches[identity]["losses"] = losses
        endpoint.billed.update(name.rpartition("-")[2] for name in names if name not in losses)
        return 200, seen(endpoint.batches[identity], endpoint)


def seen(batch: dict[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """A batch as Anthropic shows it now."""
    delay = endpoint.delay if batch["delay"] is None else batch["delay"]
    ended = time.time() > batch["created"] + delay
    counts = Counter(batch["losses"].get(request["custom_id"], "succeeded") for request in batch["requests"])
    counts["errored"] += counts.pop(True, 0)
    shown = counts if ended else {"processing": len(batch["requests"])}
    date = datetime.fromtimestamp(batch["created"], UTC).isoformat().replace("+00:00", "Z")
    return {
        "id": batch["id"],
        "type": "message_batch",
        "archived_at": batch.get("archived_at"),
        "cancel_initiated_at": None,
        "created_at": date,
        "ended_at": date if ended else None,
        "expires_at": date,
        "processing_status": "ended" if ended else "in_progress",
        "request_counts": {name: shown.get(name, 0) for name in ("processing", "succeeded", "errored", "canceled", "expired")},
        "results_url": "http://elsewhere.invalid/results" if ended else None,
    }


def message_result(endpoint: Endpoint, identity: str, request: dict[str, Any]) -> dict[str, Any]:
    """A line of the results."""
    name, body = request["custom_id"], request["params"]
    kind = endpoint.batches[identity]["losses"].get(name)
    if kind is True:
        error = {"type": "error", "error": {"type": "api_error", "message": "Internal server error"}}
        return {"custom_id": name, "result": {"type": "errored", "error": error}}
    if kind:
        return {"custom_id": name, "result": {"type": kind}}
    answer = endpoint.answer(body)
    (choice,) = answer["choices"]
    message = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": choice["message"]["content"]}],
        "stop_reason": {"stop": "end_turn", "length": "max_tokens"}[choice["finish_reason"]],
        "usage": {"input_tokens": answer["usage"]["prompt_tokens"], "output_tokens": answer["usage"]["completion_tokens"]},
    }
    return {"custom_id": name, "result": {"type": "succeeded", "message": endpoint.change(message, body)}}


def write_numbers(directory: Path, rows: int) -> Path:
    """A file of so many prompts: `Number 0.`, `Number 1.`, and so on."""
    file = directory / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Number {n}."}) + "\n" for n in range(rows)))
    return file
