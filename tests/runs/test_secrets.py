"""Tokens, keys and passwords are hidden by the name of their key, by their shape, and as the environment's."""

import json

import pytest

from distillkit.runs.secrets import hide_in_text, hide_in_words, is_secret, leave_out_secrets, without_secrets

HUB = "hf_" + "aBcDeFgHiJ" * 3
KEYS = [
    "token",
    "hf_token",
    "use_auth_token",
    "access_token",
    "Token",
    "HF_TOKEN",
    "password",
    "secret",
    "clientSecret",
]
KEYS += ["Authorization", "aws_secret_access_key", "api_key", "api-key", "apiKey", "OPENAI_API_KEY", "credentials"]
OTHERS = ["tokens", "num_tokens", "max_new_tokens", "pad_token", "eos_token", "tokenizer", "key", "PWD", "token_field"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["mine-123", {"inner": "mine-123"}, ["mine-123"], 12345678])
def test_values_of_secret_keys_are_hidden_wherever_they_are(key, value):
    kept = without_secrets({"teacher": {"kwargs": [{key: value}]}, "path": "org/teacher"})
    assert "mine" not in json.dumps(kept) and "1234" not in json.dumps(kept)
    assert kept["path"] == "org/teacher"


@pytest.mark.parametrize("key", OTHERS)
def test_other_keys_are_kept(key):
    assert not is_secret(key)
    assert without_secrets({key: "<s>"}) == {key: "<s>"}


def test_a_switch_is_no_secret():
    assert without_secrets({"token": True, "use_auth_token": None}) == {"token": True, "use_auth_token": None}


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"cannot load {HUB}: 401", "cannot load ***: 401"),
        ("http://user:pass@proxy:80/x", "http://***@proxy:80/x"),
        (f"https://{HUB}@huggingface.co/a", "https://***@huggingface.co/a"),
        ("https://s3/a?X-Amz-Signature=0f1e&x=1", "https://s3/a?X-Amz-Signature=***&x=1"),
        ("headers: {'Authorization': 'Bearer abcdef123'}", "headers: {'Authorization': 'Bearer ***'}"),
        ("sk-proj-Abcdefghij1234567890", "***"),
        ("key AKIAIOSFODNN7EXAMPLE", "key ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\n", "***\n"),
    ],
)
def test_secrets_are_known_by_their_shape(text, hidden):
    assert hide_in_text(text) == hidden
    assert without_secrets([text]) == [hidden]


@pytest.mark.parametrize(
    "text",
    [
        "The bearer of the basic understanding: a secret token is a password",
        "hf_model sk-learn-models-of-mine /cache/models--org--name 4f9a1b2c3d4e5f60718293a4b5c6d7e8f9012345",
        "mail someone@example.org, see https://example.org/@someone?page=2",
    ],
)
def test_other_text_is_kept(text):
    assert hide_in_text(text) == text


def test_secrets_of_the_environment_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-words-9")
    monkeypatch.setenv("SHORT_TOKEN", "the")
    assert without_secrets({"headers": "x plain-words-9 the"}) == {"headers": "x *** the"}


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["x.access_key=mine"], ["x.access_key=***"]),
        (["x={headers: {Authorization: Bearer mine}}"], ["x={headers: {Authorization: '***'}}"]),
        (["x={api-key: mine, b: 1}"], ["x={api-key: '***', b: 1}"]),
        (["x={proxies: {https: 'http://u:mine@p'}}"], ["x={proxies: {https: 'http://***@p'}}"]),
        (["x={token: 'a mine'}"], ["x={token: '***'}"]),
        (["x.token=[not yaml mine"], ["x.token=***"]),
        (["--hub-token", "mine", "b"], ["--hub-token", "***", "b"]),
        (["--hub-token=mine"], ["--hub-token=***"]),
        (["a.yaml", "x=[1, 2]", "tokens=20k", "--resume"], ["a.yaml", "x=[1, 2]", "tokens=20k", "--resume"]),
    ],
)
def test_command_lines(words, kept):
    assert hide_in_words(words) == kept


def test_a_file_that_is_read_again_lacks_what_is_secret():
    given = {"teacher": {"path": "a", "kwargs": {"token": "mine", "revision": "b"}}, "auth": {"user": "mine"}}
    assert leave_out_secrets(given) == {"teacher": {"path": "a", "kwargs": {"revision": "b"}}, "auth": {}}
