"""The endpoint against a server that fails, stalls and returns garbage; cache, pace, key."""

import json
import logging

import pytest

from minillm_jax.evaluation.endpoint import Endpoint, Settings
from minillm_jax.types import InputError
from tests.evaluation.judge_server import chat, serving

pytest.importorskip("openai")
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def endpoint(server, folder, pauses=None, **changes):
    given = {"key_variable": "JUDGE_KEY", "timeout": 5.0, "parallel": 1} | changes
    settings = Settings("judge", server.url, **given)
    sleep = (pauses if pauses is not None else []).append
    return Endpoint(settings, folder / "cache.jsonl", sleep=sleep)


def scored(reply):
    return reply[:1].isdigit()


def test_a_question_is_asked_once_ever(tmp_path):
    with serving() as server:
        first = endpoint(server, tmp_path)
        assert first.estimate(["one", "two", "one"])[:2] == (2, 0)
        assert first.ask(["one", "two", "one"], scored) == [server.text] * 3
        assert sorted(a["messages"][0]["content"] for a in server.asked) == ["one", "two"]
        assert server.asked[0] | {"messages": []} == {
            "model": "judge", "messages": [], "temperature": 0.0, "max_tokens": 512,
        }  # fmt: skip
        again = endpoint(server, tmp_path)
        assert again.estimate(["one", "two", "three three"]) == (1, 2, 3, 512)
        again.ask(["two", "one"], scored)
        assert len(server.asked) == 2
        # Another judge, or another setting of it, is another question.
        endpoint(server, tmp_path, temperature=1.0).ask(["one"], scored)
        assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("bad", "attempts"),
    [
        ([500, 503], 3),
        ([429], 2),
        ([b"<html>", b'{"choices": []}', b"[1]", json.dumps(chat(None)).encode()], 5),
        (["I would rather not", "8 6"], 2),
        ([0.0], 2),  # the connection is closed without a reply
    ],
)
def test_what_may_pass_is_tried_again(tmp_path, bad, attempts):
    pauses = []
    with serving(*bad) as server:
        (reply,) = endpoint(server, tmp_path, pauses).ask(["one"], scored)
        assert reply[0] == "8" and len(server.asked) == attempts
    if bad[0] == 429:
        assert pauses == [7.0]  # as the server asks for
    if bad[0] == 500:
        assert 0.25 <= pauses[0] <= 0.75 and 0.5 <= pauses[1] <= 1.5


def test_a_server_that_stalls_is_given_up_on_and_asked_again(tmp_path):
    with serving(5.0) as server:
        (reply,) = endpoint(server, tmp_path, timeout=0.5).ask(["one"], scored)
        assert reply == server.text and len(server.asked) >= 2
        assert server.stalled  # the first still waits


def test_a_run_that_breaks_off_keeps_what_it_has_and_goes_on(tmp_path):
    with serving("7", *[500] * 3) as server:
        with pytest.raises(InputError, match="no reply in 3 attempts, the last: status 500"):
            endpoint(server, tmp_path, attempts=3).ask(["one", "two", "three"], scored)
        assert len(server.asked) == 4  # and asks none of the rest
        file = tmp_path / "cache.jsonl"
        file.write_bytes(file.read_bytes().splitlines(True)[0] + b'{"key": "torn')
        told = []
        replies = endpoint(server, tmp_path).ask(["one", "two", "three"], scored, told.append)
        assert replies[0] == "7" and told == [1, 2, 3]
        assert len(server.asked) == 4 + 2
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3


def test_a_reply_that_stays_garbage_is_kept_as_it_is(tmp_path):
    with serving(text="no comment") as server:
        assert endpoint(server, tmp_path, attempts=2).ask(["one"], scored) == ["no comment"]
        assert endpoint(server, tmp_path, attempts=2).ask(["one"], scored) == ["no comment"]
        assert len(server.asked) == 2


def test_offline_replays_and_asks_nothing(tmp_path, monkeypatch):
    with serving() as server:
        endpoint(server, tmp_path).ask(["one"], scored)
        monkeypatch.delenv("JUDGE_KEY")
        away = endpoint(server, tmp_path, offline=True)
        assert away.ask(["one"], scored) == [server.text]
        with pytest.raises(InputError, match="1 of 2 questions have no reply in .*--offline"):
            away.ask(["one", "two"], scored)
        assert len(server.asked) == 1


def test_requests_keep_their_distance(tmp_path):
    now, pauses = [100.0], []

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    with serving() as server:
        settings = Settings("judge", server.url, "JUDGE_KEY", per_minute=30, parallel=1)
        Endpoint(settings, tmp_path / "c", sleep=sleep, clock=lambda: now[0]).ask(
            ["one", "two", "three"], scored
        )
    assert pauses == [2.0, 2.0]


@pytest.mark.parametrize(
    ("status", "says"), [(401, "the key is not valid"), (404, "no such model"), (422, "correct")]
)
def test_a_refusal_is_one_line_at_once(tmp_path, status, says):
    with serving(status) as server:
        with pytest.raises(InputError, match=f"status {status}; .*{says}"):
            endpoint(server, tmp_path).ask(["one"], scored)
        assert len(server.asked) == 1


@pytest.mark.parametrize("bad", [("8", 400, 422), (400, 422, "8")])
def test_a_question_that_is_refused_among_others_has_no_reply(tmp_path, bad):
    with serving(*bad, text="5") as server:
        asked, told = ["one", "two", "three", "four"], []
        replies = endpoint(server, tmp_path).ask(asked, scored, told.append)
        assert replies == ["" if isinstance(b, int) else b for b in bad] + ["5"]
        assert told == [0, 1, 2, 3, 4]
        again = endpoint(server, tmp_path, offline=True)
        assert again.ask(asked, scored) == replies and len(server.asked) == 4
        # What is kept says that the server takes questions, if this one is the only new one.
        server.script.append(400)
        assert endpoint(server, tmp_path).ask([*asked, "five"], scored) == [*replies, ""]


def test_a_server_that_refuses_every_question_is_believed(tmp_path):
    with serving(*[400] * 14) as server:
        says = "status 400; the model may not know --temperature"
        with pytest.raises(InputError, match=says):
            endpoint(server, tmp_path).ask([str(n) for n in range(12)], scored)
        assert len(server.asked) == 10
        with pytest.raises(InputError, match=says):  # fewer questions than it takes to be sure
            endpoint(server, tmp_path).ask(["one", "two"], scored)
        assert not (tmp_path / "cache.jsonl").exists()


def test_questions_that_are_refused_here_and_there_end_no_run(tmp_path):
    with serving(*([400] * 5 + ["8"]) * 3) as server:
        replies = endpoint(server, tmp_path).ask([str(n) for n in range(18)], scored)
        assert replies == ([""] * 5 + ["8"]) * 3


def test_a_server_that_begins_to_refuse_ends_the_run_and_is_asked_again(tmp_path):
    asked = [str(n) for n in range(16)]
    with serving("8", *[400] * 10, text="5") as server:
        with pytest.raises(InputError, match="status 400"):
            endpoint(server, tmp_path).ask(asked, scored)
        assert len(server.asked) == 11
        assert endpoint(server, tmp_path).ask(asked, scored) == ["8"] + ["5"] * 15


def test_the_key_is_sent_and_is_nowhere_else(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for reply in (401, 500, b"<html>", "8 6"):
        with serving(reply) as server:
            try:
                endpoint(server, tmp_path, attempts=1).ask([str(reply)], scored)
            except InputError as error:
                seen = error
                while seen:  # no exception of the chain that would be shown quotes the server
                    assert KEY not in str(seen) and not seen.__cause__
                    assert seen.__suppress_context__ or not seen.__context__
                    seen = seen.__context__ if not seen.__suppress_context__ else None
            assert server.keys == [f"Bearer {KEY}"]
    out = capfd.readouterr()
    assert KEY not in caplog.text + out.out + out.err
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files and not any(KEY in file.read_text() for file in files)


def test_no_key_and_an_address_that_holds_one(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match="set the environment variable JUDGE_KEY"):
        Endpoint(Settings("gpt", key_variable="JUDGE_KEY"), tmp_path / "c").ask(["one"], scored)
    for url in ("http://me:secret@host/v1", "http://host/v1?api_key=secret"):
        with pytest.raises(InputError) as error:
            Endpoint(Settings("gpt", url), tmp_path / "c")
        assert "secret" not in str(error.value)
    with serving() as server:  # a server of one's own may need none
        assert endpoint(server, tmp_path).ask(["one"], scored) == [server.text]


def test_the_cost_is_that_of_what_is_not_there_yet(tmp_path):
    with serving() as server:
        found = endpoint(server, tmp_path, max_tokens=100).estimate(["a" * 4000, "b" * 4000])
    assert found == (2, 0, 2000, 200) and found.cost(10.0, 50.0) == pytest.approx(0.03)
