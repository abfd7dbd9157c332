"""A model behind an OpenAI-compatible server has the scores that it has in memory; one that has none says so."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from distillkit.cli import main
from distillkit.config.errors import UserError
from distillkit.config.evaluate import EvaluateConfig
from distillkit.config.server import ServerConfig
from distillkit.evaluation import evaluate
from distillkit.evaluation.benchmarks import run_benchmark, run_served_benchmark
from distillkit.models.loading import load_model, load_tokenizer, weights_sha256
from distillkit.models.server import Server, connect
from distillkit.reporting import write_report
from tests.evaluation.completions import Completions, serving
from tests.evaluation.test_benchmarks import SAMPLES, TASKS, differs_by_sample, settings
from tests.training.tiny import save_llama, tokenizer

KEY = "students.a.server"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer puts BOS before a text and EOS behind it."""
    path = save_llama(tmp_path_factory.mktemp("server") / "model", 0, max_position_embeddings=512)
    own = tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    own.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def completions(folder, model, **options):
    return Completions(model, load_tokenizer(folder), folder, **{"root": folder, "max_length": 512, **options})


def served(folder, url, **options):
    server = Server(KEY, ServerConfig.parse({"url": url, **options}))
    return connect(server, folder, weights_sha256(folder, {}), load_tokenizer(folder))


@pytest.mark.parametrize("concurrency", [1, 8])
def test_scores_are_those_of_the_model_in_memory(folder, model, concurrency, capfd):
    """Likelihoods and generated texts; every prompt has one BOS and no EOS."""
    expected = run_benchmark(model, load_tokenizer(folder), settings(num_fewshot=2), "distillkit_school", limit=SAMPLES)
    with serving(answers := completions(folder, model)) as url:
        through = served(folder, url, concurrency=concurrency)
        found = run_served_benchmark(through, settings(num_fewshot=2), "distillkit_school", limit=SAMPLES)
    about = {"url": url, "model": folder, "by": "vllm 0.0.test", "max_length": 512}
    assert found == {task: {**scores, "server": about} for task, scores in expected.items()}
    assert differs_by_sample(found["distillkit_fingerprints"])
    assert all(ids[0] == 1 and 1 not in ids[1:] and 2 not in ids for ids in answers.prompts)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("packages_unasked")
def test_an_evaluation_through_a_server(folder, model, tmp_path, monkeypatch):
    """Without the weights in memory; the report says where scores come from; the key is in no file."""
    monkeypatch.setenv("SERVED_KEY", "sesame-open-1234")
    monkeypatch.setattr("distillkit.evaluation.model_spec.load_model", None)
    said = io.StringIO()
    with serving(completions(folder, model, key="sesame-open-1234")) as url:
        server = {"url": f"{url}/", "api_key_env": "SERVED_KEY"}
        config = EvaluateConfig.parse(
            {
                "output_path": str(tmp_path / "out"),
                "students": {"a": {"path": folder, "server": server}},
                "benchmarks": {"tasks": ["distillkit_facts"], "include_path": [str(TASKS)]},
                "limit": 4,
            }
        )
        results = evaluate(config, Console(file=said, width=150))
    assert not results["failures"], results["failures"]
    assert results["benchmarks"]["a"]["distillkit_facts"]["server"]["url"] == url
    assert results["models"]["a"]["parameters"] == model.num_parameters()
    assert evaluate(config, Console(file=said, width=150))["benchmarks"] == results["benchmarks"]  # the server is gone
    report = write_report([tmp_path / "out"], tmp_path / "report").read_text()
    assert f"a answered through {url} (vllm 0.0.test), as {folder}: distillkit_facts." in report
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not any(b"sesame" in path.read_bytes() for path in written)


def test_a_server_without_prompt_likelihoods_answers_generated_tasks_alone(folder, model):
    with serving(completions(folder, model, likelihoods=False)) as url:
        through = served(folder, url)
        assert run_served_benchmark(through, settings(), "distillkit_sums", limit=2)
        with pytest.raises(
            UserError, match=r"students\.a\.server\.url: the server gives no log-probabilities of a prom"
        ):
            run_served_benchmark(through, settings(), "distillkit_facts", limit=2)


def test_what_a_server_refuses_is_told(folder, model, monkeypatch):
    """Without the key, which it may repeat."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setenv("SERVED", "20 tokens")
    with serving(answers := completions(folder, model)) as url:
        through = served(folder, url, api_key_env="SERVED")
        answers.card["max_model_len"] = 20
        with pytest.raises(RuntimeError, match=r"400.*maximum context length is \*\*\*"):
            run_served_benchmark(through, settings(), "distillkit_sums", limit=2)
        with pytest.raises(UserError, match="max_length: is 8, but answers alone may have 8 tokens"):
            run_served_benchmark(served(folder, url, max_length=8), settings(), "distillkit_sums", limit=2)


def test_a_key_is_for_one_server(folder, model):
    """A server that sends elsewhere is not followed."""
    with serving(completions(folder, model)) as url:
        asked = []

        class Elsewhere(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_response(302)
                self.send_header("Location", f"{url}{self.path.removeprefix('/v1')}")
                self.end_headers()

            def log_message(self, *_):
                pass

        with HTTPServer(("localhost", 0), Elsewhere) as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            with pytest.raises(UserError, match=r"/v1/models answers 302 Found"):
                served(folder, f"http://localhost:{other.server_port}/v1")
            other.shutdown()
        assert asked == ["/v1/models"]


def test_mistakes_are_told_before_anything_is_measured(folder, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TWO_LINES", "sk-SECRET\nsk-OTHER")
    other = save_llama(tmp_path / "other", 1)

    def refused(url, **options):
        with pytest.raises(UserError) as error:
            served(folder, url, **options)
        return str(error.value)

    with serving(answers := completions(folder, model, key="sesame")) as url:
        assert f"{KEY}.api_key_env: {url}/models wants another key; name the env" in refused(url)
        answers.key = None
        assert f"{KEY}.model: {url} serves {folder}, not hybrid; write the name" in refused(url, model="hybrid")
        assert "max_length: is 1024, but the server takes 512 tokens" in refused(url, max_length=1024)
        assert f"{KEY}.url: {url}/v1/models answers 404 Not Found" in refused(f"{url}/v1")
        answers.card["root"] = other
        assert f"{KEY}.model: {folder!r} is {other!r}, whose weights are not those of {folder!r}" in refused(url)
        answers.card |= {"root": None, "max_model_len": None}
        assert f"{KEY}.max_length: is missing: the server does not tell" in refused(url)
    assert f"{KEY}.url: no answer from {url}/models" in refused(url)

    evaluation = ["evaluate", "--student", f"a={folder}", "--out", str(tmp_path / "out"), "--suite", "benchmarks"]
    evaluation += ["benchmarks.tasks=[distillkit_facts]", f"benchmarks.include_path=[{TASKS}]"]
    for value, problem in (
        (url, f"{KEY}.url: no answer from {url}/models"),
        ("localhost:8000", f"{KEY}: must be the address of an API, such as http://localhost:8000/v1"),
        ("sk-SECRET@host/v1", f"{KEY}: must be the address of an API, such as http://localhost:8000/v1"),
        ("http://me:sk-SECRET@host/v1", f"{KEY}: must hold no key or password"),
        ("http://host/v1#sk-SECRET", f"{KEY}: must hold no key or password"),
        ("http://host:99999/v1", f"{KEY}: must have a port from 0 to 65535"),
        (json.dumps({"url": url, "api_key_env": "TWO_LINES"}), f"{KEY}.api_key_env: what TWO_LINES holds is no key"),
        (
            json.dumps({"url": url, "api_key_env": "NO_SUCH"}),
            f"{KEY}.api_key_env: the environment has no variable 'NO_",
        ),
        ("{}", f"{KEY}.url: is missing: address of"),
    ):
        assert main([*evaluation, f"students.a.server={value}"]) == 2
        said = capsys.readouterr().err
        assert problem in said and "SECRET" not in said
    assert not list(Path(tmp_path / "out").glob("units/*"))
    speed = [*evaluation[:-3], "speed", "students.a.server=http://localhost:8000/v1"]
    assert main(speed) == 2
    assert f"{KEY}: has no effect: only benchmarks are" in capsys.readouterr().err
