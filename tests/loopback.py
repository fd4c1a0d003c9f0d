"""A server on loopback that speaks OpenAI's protocol, and misbehaves as a test's script tells it."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def sum_of_numbers(prompt: str) -> str:
    """The answer to "… N + M …"."""
    return str(sum(int(word) for word in prompt.split() if word.isdigit()))


class Server(ThreadingHTTPServer):
    """Answers prompts by `answer`; `script` holds what to do with the next requests instead: a name of `Handler.act`,
    a (status, headers), or {"say": text}. `refuse` makes of a request's body the error of a 400, or None.
    """

    daemon_threads = True

    def __init__(self, answer=sum_of_numbers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.refuse = lambda body: None
        self.script, self.seen, self.times, self.at_once, self.most_at_once = [], [], [], 0, 0
        self.lock = threading.Lock()
        poll_s = 0.01  # until it notices its end
        threading.Thread(target=self.serve_forever, args=(poll_s,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.seen.append((self.path, body, dict(self.headers)))
            server.times.append(time.monotonic())
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            act = server.script.pop(0) if server.script else "answer"
        time.sleep(0.02)
        with server.lock:
            server.at_once -= 1
        if act == "hang":
            time.sleep(2.0)
            return
        if act == "trickle":
            self.send_response(200)
            self.send_header("content-length", "100000")
            self.end_headers()
            for _ in range(100):
                time.sleep(0.05)
                try:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                except OSError:
                    return
            return
        if act == "drop":
            self.close_connection = True
            self.connection.close()
            return
        status, content, headers = 200, None, {}
        if act == "answer" and (error := server.refuse(body)):
            status, content = 400, json.dumps({"error": error})
        elif isinstance(act, tuple):
            status, headers = act
            content = json.dumps({"error": {"message": f"status {status}"}})
        elif act == "garbage":
            content = "<html>no JSON"
        elif act == "empty":
            content = json.dumps({"id": "x", "object": "text_completion", "choices": []})
        elif act == "null":
            content = json.dumps({"choices": [{"text": None, "message": {"content": None}, "finish_reason": "stop"}]})
        else:
            prompt = body.get("prompt") or body["messages"][-1]["content"]
            text = act["say"] if isinstance(act, dict) else server.answer(prompt)
            choice = {"index": 0, "finish_reason": "stop", "text": text}
            choice["message"] = {"role": "assistant", "content": text}
            content = json.dumps({"choices": [choice], "usage": {"completion_tokens": 1}})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *arguments):
        pass


def refuse_as_gpt_5(body: dict) -> dict | None:
    """What OpenAI's API says to parameters that its reasoning models do not take."""
    if "max_tokens" in body:
        text = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return {
            "message": text,
            "type": "invalid_request_error",
            "param": "max_tokens",
            "code": "unsupported_parameter",
        }
    if body.get("temperature", 1) != 1:
        text = "Unsupported value: 'temperature' does not support 0 with this model. "
        text += "Only the default (1) value is supported."
        return {"message": text, "type": "invalid_request_error", "param": "temperature", "code": "unsupported_value"}
    if "seed" in body:
        text = "Unsupported parameter: 'seed' is not supported with this model."
        return {"message": text, "type": "invalid_request_error", "param": "seed", "code": "unsupported_parameter"}
    return None


FILTERED = {  # Azure's words
    "message": "The response was filtered due to the prompt triggering Azure OpenAI's content management policy.",
    "type": None,
    "param": "prompt",
    "code": "content_filter",
    "status": 400,
}
