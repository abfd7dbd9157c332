"""A teacher behind a server is the live teacher cut to its k likeliest tokens; any other server is refused."""

import json
import socket
import threading
import time

import pytest
import torch

from distillkit.config import UserError
from distillkit.config.server import ServerConfig
from distillkit.config.teacher import ServerTeacherConfig
from distillkit.models.loading import load_model, load_tokenizer
from distillkit.models.server import Server
from distillkit.planning import plan_run
from distillkit.runs.record import read_record
from distillkit.teacher import SignalRequest
from distillkit.teacher import served as served_module
from distillkit.teacher.live import LiveTeacher
from distillkit.teacher.served import open_served
from tests.evaluation.completions import serving
from tests.teacher.prompt_logprobs import PromptLogprobs
from tests.training.captures import captured, configuration, first_step, run
from tests.training.test_trainer import assert_same
from tests.training.tiny import BYTES, batch, row, save_llama, save_text, tokenizer

KL = {"function": "kl", "weight": 0.5, "temperature": 2.0, "missing_probability_handling": "symmetric_uniform"}
LOSSES = [
    {"function": "cross_entropy", "weight": 0.1},
    KL,
    {"function": "jsd", "weight": 0.2, "missing_probability_handling": "zero"},
    {"function": "hinge", "weight": 0.2, "top_k": 4, "margin": 0.2},
]
BACKGROUND = [{"function": "kl", "weight": 1.0, "missing_probability_handling": "background"}]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    return {
        "teacher": save_llama(folder / "teacher", 0),
        "student": save_llama(folder / "student", 1),
        "text": save_text(folder / "train.jsonl"),
        "folder": folder,
    }


@pytest.fixture(scope="module")
def model(inputs):
    return load_model(inputs["teacher"])


def answers(inputs, model, **options):
    return PromptLogprobs(model, load_tokenizer(inputs["teacher"]), "big", root=inputs["teacher"], **options)


def opened(url, sequence_length=64, tokens=None, **settings):
    section = ServerTeacherConfig.parse({"kind": "server", "url": url, "top_k": 5, "patience": 0, **settings})
    return open_served(section, tokens or tokenizer(), sequence_length, None)


def refused(url, **settings):
    with pytest.raises(UserError) as error:
        opened(url, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def described(inputs, url, folder, **changes):
    """One step on packed rows from the live teacher cut to five tokens, or with `url` from the served one."""
    live = {"kind": "hf", "path": inputs["teacher"], "top_k": 5}
    teacher = live if url is None else {"kind": "server", "url": url, "top_k": 5}
    dataset = {"train_dataset": {"disk_path": inputs["text"]}}
    given = {"loss_functions": LOSSES, "dataset": dataset, **changes}
    given["teacher"] = {**teacher, **changes.get("teacher", {})}
    return configuration(inputs["student"], "", folder, **given)


def assert_same_step(served, live):
    assert served[0] == pytest.approx(live[0], rel=1e-5)
    assert_same(served[1], live[1], 1e-5)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "documents"])
def test_loss_and_gradients_are_those_of_the_live_teacher_cut_to_its_top_k(inputs, model, tmp_path, packing):
    dataset = {"train_dataset": {"disk_path": inputs["text"]}, "packing": packing}
    with serving(server := answers(inputs, model)) as url:
        served = first_step(described(inputs, url, tmp_path / "served", dataset=dataset))
    assert_same_step(served, first_step(described(inputs, None, tmp_path / "live", dataset=dataset)))
    assert all(body["prompt_logprobs"] in (1, 5) and body["max_tokens"] == 1 for body in server.bodies)


def test_the_background_takes_the_missing_probability(inputs, model, tmp_path):
    background = captured(
        inputs["teacher"], inputs["text"], tmp_path / "top5", {"plain": {"k": 5, "vocab_size": BYTES}}
    )
    with serving(answers(inputs, model)) as url:
        steps = [
            first_step(
                described(inputs, to, tmp_path / name, loss_functions=BACKGROUND, teacher={"background": background})
            )
            for to, name in ((url, "served"), (None, "live"))
        ]
    assert_same_step(*steps)


def test_a_run_whose_requests_go_ahead_is_the_run_with_a_live_teacher(inputs, model, tmp_path):
    """Over epochs and micro-batches, with a ranking loss, which looks at a batch twice."""
    training = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    training |= {"gradient_accumulation_steps": 2, "learning_rate": 0.1, "seed": 3}
    text = {"disk_path": save_text(tmp_path / "few.jsonl", documents=16)}
    others = {"training": training, "dataset": {"train_dataset": text}}
    others |= {"evaluation": {"dataset": text, "num_tokens": 60}}
    lines, asked = {}, {}
    with serving(server := answers(inputs, model)) as url:
        for ahead in (0, 2):
            folder = tmp_path / str(ahead)
            before = len(server.bodies)
            said = run(described(inputs, url, folder, teacher={"steps_ahead": ahead}, **others))
            asked[ahead] = sorted(json.dumps(body["prompt"]) for body in server.bodies[before:])
            lines[ahead] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open() if "loss" in line]
        record = read_record(tmp_path / "2")
        assert "KL over stored tokens" in said
        assert record.origins["teacher"] == {"url": url, "model": "big", "by": "vllm 0.0.test", "max_length": 512}
    assert set(asked[0]) == set(asked[2]) and len(asked[2]) <= len(asked[0])  # of equal ones nearby, one is asked for
    run(described(inputs, None, tmp_path / "live", **others))
    live = [json.loads(line)["loss"] for line in (tmp_path / "live" / "metrics.jsonl").open() if "loss" in line]
    assert len(live) > 3 and lines[0] == lines[2] == pytest.approx(live, rel=1e-5)


def test_only_what_a_loss_counts_is_sent(inputs, model):
    """Neither padding nor documents without a counted token; of a document nothing behind the last one."""
    rows = [row([7, 5, 4], seed=1), row([9], seed=2, ignored=8)]
    rows[0]["labels"][5:7] = [-100, -100]
    rows[0]["labels"][12:] = [-100] * 4
    made = batch(*rows, sequence_length=20)
    with serving(server := answers(inputs, model)) as url:
        teacher = opened(url)
        server.bodies.clear()
        teacher.expect([made])
        signal = teacher.signal(made, SignalRequest(vocabulary_size=50))
        counted = torch.tensor([0, 3, 7, 10])
        given = signal.distribution(counted)(slice(0, 4))
        with pytest.raises(ValueError, match="whose next token no loss counts"):
            signal.distribution(torch.tensor([4]))
    ids = rows[0]["input_ids"]
    assert sorted(body["prompt"] for body in server.bodies) == sorted([ids[:5], ids[7:12]])
    whole = LiveTeacher(model).signal(made).distribution(counted)(slice(0, 4)).top_k(5).first_columns(50)
    torch.testing.assert_close(given.logprobs, whole.logprobs)
    assert torch.equal(given.ids, whole.ids) and (given.logprobs == -torch.inf).any()


def test_a_server_that_is_away_for_a_while_is_waited_for(inputs, model, caplog):
    def fail(body):
        if fails and len(body["prompt"]) == 12:
            raise fails.pop()

    fails = []
    with serving(answers(inputs, model, fail=fail)) as url:
        teacher = opened(url, patience=20)
        fails += [ConnectionError("gone")]
        made = batch(row([12]))
        given = teacher.signal(made).distribution(torch.tensor([3]))(slice(0, 1))
    assert not fails and given.ids.shape == (1, 5)
    assert "no answer from" in caplog.text and "it is asked again" in caplog.text


def test_failures_end_in_one_line(inputs, model, monkeypatch):
    monkeypatch.setattr(served_module, "ANSWER_SECONDS", 0.5)
    made = batch(row([12]))

    def change(**entry):
        answer = PromptLogprobs.complete(server, {**body, "prompt": made["input_ids"][0].tolist()})
        return {**answer, "choices": [{**answer["choices"][0], **entry}]}

    with serving(server := answers(inputs, model)) as url:
        teacher = opened(url)
        body = {"model": "big", "max_tokens": 1, "prompt_logprobs": 5}
        entries = change()["choices"][0]["prompt_logprobs"]
        fewer = [None, *({token: each[token] for token in list(each)[:3]} for each in entries[1:])]
        nan = json.loads(json.dumps(entries).replace('"logprob": -', '"logprob": NaN, "was": -'))
        for instead, problem in (
            (change(prompt_logprobs=None), "gives no log-probabilities of a prompt (prompt_logprobs), as vLLM does"),
            (change(prompt_logprobs=entries[:-1]), "is about 11 tokens, but 12 were sent"),
            (change(prompt_logprobs=[None, *entries[2:], entries[1]]), "does not score token"),
            (change(prompt_logprobs=fewer), "likeliest tokens of each place"),
            (change(prompt_logprobs=nan), "log-probabilities that are no numbers"),
            ({"error": "busy"}, "has no choices"),
            (lambda: time.sleep(1), "timed out; start the server"),
        ):
            server.fail = lambda body, instead=instead: instead() if callable(instead) else instead
            with pytest.raises(UserError, match=r"^teacher\.url: [^\n]*$") as error:
                teacher.signal(made).distribution(torch.tensor([3]))
            assert problem in str(error.value)


def test_a_server_that_cannot_be_the_teacher_is_refused_before_training(inputs, model, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "open-sesame-1")
    with serving(server := answers(inputs, model, key="open-sesame-1")) as url:
        assert f"teacher.api_key_env: {url}/models wants another key" in refused(url)
        opened(url, api_key_env="TEACHER_KEY")
        server.key = None
        assert f"teacher.model: {url} serves big, not small; write" in refused(url, model="small")
        assert "teacher.top_k: is 30, which the server refuses: " in (found := refused(url, top_k=30))
        assert "greater than max allowed: 20" in found and "--max-logprobs" in found
        assert "sequence_length: is 512, and the server needs room for one token more" in refused(
            url, sequence_length=512
        )
        more = tokenizer()
        more.add_tokens(["<extra>"])
        assert "Token id 259 is out of vocabulary" in (found := refused(url, tokens=more))
        assert "say how many in teacher.vocab_size" in found
        opened(url, tokens=more, vocab_size=BYTES)
        swapped = json.loads(tokenizer().backend_tokenizer.to_str())
        swapped["model"]["vocab"] |= {"A": swapped["model"]["vocab"]["B"], "B": swapped["model"]["vocab"]["A"]}
        other = tokenizer()
        other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(swapped))
        assert "is 'A' for 'big' and 'B' for the student; name a teacher that has" in refused(url, tokens=other)
        server.fail = lambda body: {"choices": [{"index": 0, "text": "of another server"}]}
        assert "gives no log-probabilities of a prompt" in refused(url)
        server.card["id"], server.fail = "other", None
    assert f"teacher.url: no answer from {url}/models" in refused(url)


def test_it_is_planned_without_the_server(inputs, tmp_path):
    planned = plan_run(described(inputs, "http://localhost:1/v1", tmp_path / "out"), gpu="cpu")
    assert not planned.errors
    assert any(line.startswith("teacher.url: the server is not asked by a plan") for line in planned.warnings)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loss_functions": [{"function": "hs_mse", "weight": 1.0}], "layer_mapping": "all"}, "server has no hidden"),
        ({"loss_functions": [{"function": "attn_mse", "weight": 1.0}]}, "server has no attention outputs"),
        ({"loss_functions": BACKGROUND}, "background needs teacher.background"),
        ({"teacher": {"top_k": None}}, r"teacher\.top_k: is missing"),
        ({"teacher": {"url": "http://me:secret@host/v1"}}, r"teacher\.url: must hold no key"),
    ],
)
def test_what_a_server_cannot_be_asked_is_refused_in_the_configuration(inputs, tmp_path, changes, problem):
    with pytest.raises(UserError, match=problem):
        described(inputs, "http://localhost:1/v1", tmp_path / "out", **changes)


def test_another_model_at_the_address_ends_a_resumed_run(inputs, model, tmp_path):
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    with serving(server := answers(inputs, model)) as url:
        run(described(inputs, url, tmp_path / "out", training=training))
        (tmp_path / "out" / "results.json").unlink()
        server.card["root"] = "/models/other"
        with pytest.raises(UserError, match=r"teacher\.model: is not what it was when the run .* its model is another"):
            run(described(inputs, url, tmp_path / "out", training=training, resume=True))


def test_a_server_that_takes_one_token_more_than_a_row_has_is_long_enough(inputs, model):
    with serving(answers(inputs, model, max_length=65)) as url:
        assert opened(url, sequence_length=64).vocabulary_size == BYTES


def test_an_error_whose_words_break_off_is_an_error_like_others():
    def answer():
        with listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nend")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, daemon=True).start()
        server = Server("teacher", ServerConfig.parse({"url": f"http://127.0.0.1:{listener.getsockname()[1]}/v1"}))
        with pytest.raises(UserError, match=r"^teacher\.url: [^\n]* answers 503 Service Unavailable: "):
            server.ask(f"{server.settings.url}/models")


def test_a_key_stays_out_of_a_servers_words(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "open-sesame-1")
    server = Server("teacher", ServerConfig.parse({"url": "http://localhost:1/v1", "api_key_env": "TEACHER_KEY"}))
    assert server.hide("no open-sesame-1") == "no ***"
