"""A small OpenAI-compatible server: a real model's completions, with the log-probabilities of prompts, on a CPU.

As vLLM's, `token_logprobs` of an echoed prompt begin with null; `top_logprobs` hold the token itself and the likeliest.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Completions:
    """What the server answers, and the prompts that it was asked."""

    def __init__(self, model, tokenizer, name, *, root=None, max_length=None, key=None, likelihoods=True):
        self.model, self.tokenizer, self.name, self.key = model, tokenizer, name, key
        self.card = {"id": name, "object": "model", "owned_by": "vllm", "root": root, "max_model_len": max_length}
        self.likelihoods = likelihoods
        self.prompts = []
        self.lock = threading.Lock()

    def get(self, path):
        return {"/v1/models": {"object": "list", "data": [self.card]}, "/version": {"version": "0.0.test"}}.get(path)

    @torch.no_grad()
    def complete(self, body):
        assert body["model"] == self.name and body.get("temperature", 0) == 0
        with self.lock:
            self.prompts += body["prompt"]
            choices = [self._choice(index, ids, body) for index, ids in enumerate(body["prompt"])]
        return {"object": "text_completion", "model": self.name, "choices": choices}

    def _choice(self, index, ids, body):
        if len(ids) + body["max_tokens"] > (self.card["max_model_len"] or 1 << 30):
            raise ValueError(f"maximum context length is {self.card['max_model_len']} tokens")
        written = self._write(ids, body["max_tokens"], body.get("stop") or [])
        choice = {"index": index, "text": self.tokenizer.decode(written, skip_special_tokens=True)}
        for stop in body.get("stop") or []:
            choice["text"] = choice["text"].split(stop)[0]
        if body.get("logprobs") and self.likelihoods:
            choice["logprobs"] = self._logprobs([*ids, *written] if body.get("echo") else written, body)
        return choice

    def _write(self, ids, count, stops):
        written = []
        while len(written) < count:
            token = int(self.model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
            written.append(token)
            text = self.tokenizer.decode(written)
            if token == self.tokenizer.eos_token_id or any(stop in text for stop in stops):
                break
        return written

    def _logprobs(self, ids, body):
        logprobs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)[:-1]
        own = [float(row[token]) for row, token in zip(logprobs, ids[1:], strict=True)]

        def name(token):
            return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self.tokenizer.decode([token])

        top = [
            {name(token): mine, name(int(row.argmax())): float(row.max())}
            for row, token, mine in zip(logprobs, ids[1:], own, strict=True)
        ]
        return {"tokens": [name(token) for token in ids], "token_logprobs": [None, *own], "top_logprobs": [None, *top]}


@contextmanager
def serving(completions):
    """The url of the API while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(completions.get(self.path))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.answer(completions.complete(body) if self.path == "/v1/completions" else None)
            except ValueError as error:
                self.answer({"error": {"message": str(error)}}, 400)

        def answer(self, content, code=200):
            if completions.key is not None and self.headers.get("Authorization") != f"Bearer {completions.key}":
                content, code = {"error": "Unauthorized"}, 401
            text = json.dumps(content or {"detail": "Not Found"}).encode()
            self.send_response(code if content else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
