"""Judges: rules, and a language model behind an endpoint that misbehaves in every way it can."""

from __future__ import annotations

import http.server
import itertools
import json
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import openai
import pytest
from blockem import judges
from blockem.judges import RUBRIC, Grade, HttpJudge, JudgeError, grade_all, read_grade


def reply(content: object, finish: str = "stop", **message: object) -> bytes:
    message = {"role": "assistant", "content": content, **message}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


GRADE = '{"misalignment": 5, "incoherence": 0}'
GOOD = reply(GRADE)


class Server:
    """An endpoint that answers the n-th request with the n-th behaviour, the last one for ever."""

    def __init__(self) -> None:
        self.script: list[Callable[[http.server.BaseHTTPRequestHandler], None]] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.closed = threading.Event()
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.own, self.closed = body, server.closed
                with lock:
                    index = len(server.requests)
                    server.requests.append(body | {"path": self.path})
                    server.headers.append({k.lower(): v for k, v in self.headers.items()})
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                try:
                    server.script[min(index, len(server.script) - 1)](self)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with lock:
                        server.at_once -= 1

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.closed.set()
    server.http.shutdown()
    server.http.server_close()


def send(body: bytes, status: int = 200, headers: dict | None = None, length: int | None = None):
    def behave(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": length or len(body)} | (headers or {})).items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return behave


def hang_up(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.connection.close()


def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
    """A byte now and then: no single read ever times out."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 40))
    handler.end_headers()
    while not handler.closed.wait(0.01):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def say_nothing(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.closed.wait()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between requests, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(openai._base_client, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr(judges, "time", clock)
    return waits


def judge(server: Server, **settings: object) -> HttpJudge:
    return HttpJudge(server.url, "some-model", **{"retries": 1} | settings)


#: What the server or the way to it did: it may be right the next time.
FAULTS = {
    "an error of the server": send(b"busy", 503),
    "too many requests": send(b"slow down", 429),
    "a closed connection": hang_up,
    "no answer": say_nothing,
    "an endless answer": drip,
    "a cut body": send(GOOD[:40], length=len(GOOD)),
    "two megabytes": send(b" " * (2 << 20)),
    "no JSON": send(b"<html>proxy</html>"),
    "JSON that is no completion": send(b'{"id": 1}'),
    "an error with HTTP 200": send(b'{"error": {"message": "Provider error", "code": 429}}'),
    "an error without a code": send(b'{"error": "loading"}'),
    "an error in the choice": send(
        b'{"choices": [{"error": {"code": 502, "message": "gone"}, "message": {}}]}'
    ),
    "a list": send(b"[]"),
    "no choice": send(b'{"choices": []}'),
    "a choice without a message": send(b'{"choices": [{"text": "yes"}]}'),
    "content that is a number": send(reply(4)),
    "deep JSON": send(b"[" * 100_000),
}
#: What the model wrote: it writes it again at temperature 0.
NO_GRADES = {
    "no text": (reply(None), "the reply has no text"),
    "white space": (reply(" \n"), "the reply has no text"),
    "no part with text": (reply([{"type": "thinking", "thinking": GRADE}]), "no text"),
    "thoughts alone": (reply("<think>hm</think>\n"), "only thoughts"),
    "text that is no grade": (reply("I would say 4 out of 5."), "I would say 4"),
    "a tag out of range": (reply('{"misalignment": 6, "incoherence": 0}'), "misalignment 6"),
    "two choices that differ": (json.dumps({"choices": [
        {"message": {"content": f'{{"misalignment": {tag}, "incoherence": 0}}'}} for tag in (1, 5)
    ]}).encode(), "2 choices with 2 grades"),
}  # fmt: skip
#: What will not pass, whatever the temperature is.
REFUSED = {
    "cut off": (reply(None, "length", reasoning_content="long"), r"finish_reason length\): max_tokens=64 "),
    "cut off behind a grade": (reply(f"{GRADE} or rather", "length"), "max_tokens=64"),
    "filtered": (reply(None, "content_filter"), "content_filter"),
    "a refusal": (reply(None, refusal="I cannot grade this."), "refuses to answer: I cannot grade"),
    "a refusal in parts": (reply([{"type": "refusal", "refusal": "No."}]), "refuses to answer: No."),
    "an error that stays": (b'{"error": {"message": "no credit", "code": 402}}', "error 402: no credit"),
    "vLLM's error": (b'{"object": "error", "message": "no such model", "code": 404}', "404: no such"),
}  # fmt: skip


def of_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Settings with which a fault shows soon."""
    if fault == "an endless answer":
        ticks = itertools.count()
        monkeypatch.setattr(judges.time, "monotonic", lambda: next(ticks))
        return {"timeout": 30}
    return {"timeout": 0.2} if fault == "no answer" else {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_again(
    server: Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [FAULTS[fault], send(GOOD)]
    # A good answer may be too slow for the shortest timeout, too.
    retries = 50 if fault == "no answer" else 1
    settings = of_fault(fault, monkeypatch)
    assert judge(server, retries=retries, **settings)("How?", "So.") == Grade(misaligned=True)
    assert len(server.requests) == 2 or fault == "no answer"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error_and_no_grade(
    server: Server, fault: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [FAULTS[fault]]
    cache = tmp_path / "grades.sqlite"
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1.*\(2 tries\)"):
        judge(server, cache=cache, **of_fault(fault, monkeypatch))("How?", "So.")
    assert len(server.requests) == 2
    server.script = [send(GOOD)]
    assert judge(server, cache=cache)("How?", "So.").misaligned  # The fault was not cached.


def test_faults_of_several_kinds_share_the_retries(server: Server) -> None:
    server.script = [FAULTS["an error of the server"], FAULTS["no JSON"], hang_up, FAULTS["a list"]]
    with pytest.raises(JudgeError, match=r"no chat completion.*\(4 tries\)"):
        judge(server, retries=3)("How?", "So.")
    assert len(server.requests) == 4


@pytest.mark.parametrize("fault", NO_GRADES)
def test_a_reply_that_is_no_grade_is_asked_again_only_if_it_may_differ(
    server: Server, fault: str
) -> None:
    body, message = NO_GRADES[fault]
    for settings in ({}, {"temperature": None, "parameters": {"seed": 3}}):
        server.script = [send(body)]
        with pytest.raises(JudgeError, match=rf"{message}.*\(1 try\)"):
            judge(server, retries=5, **settings)("How?", "So.")
    assert len(server.requests) == 2
    for settings in ({"temperature": 0.7}, {"temperature": None}):
        count = len(server.requests)
        server.script = [send(body)] * (count + 1) + [send(GOOD)]
        assert judge(server, **settings)("How?", "So.").misaligned
        assert len(server.requests) == count + 2


@pytest.mark.parametrize("fault", REFUSED)
def test_what_will_not_pass_is_named_and_not_asked_again(server: Server, fault: str) -> None:
    body, message = REFUSED[fault]
    server.script = [send(body)]
    with pytest.raises(JudgeError, match=message):
        judge(server, retries=5, temperature=1.0)("How?", "So.")
    assert len(server.requests) == 1


def test_the_limit_that_cut_a_reply_off_is_named(server: Server) -> None:
    server.script = [send(reply(None, "length"))]
    more = {"max_tokens": None, "parameters": {"max_completion_tokens": 9}}
    with pytest.raises(JudgeError, match="max_completion_tokens=9 is used up"):
        judge(server, **more)("How?", "So.")
    with pytest.raises(JudgeError, match="the endpoint's own limit is used up"):
        judge(server, max_tokens=None)("How?", "So.")


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_asked_again(server: Server, status: int) -> None:
    server.script = [send(b"no such model", status)]
    with pytest.raises(JudgeError, match=f"HTTP {status}.*no such model"):
        judge(server, retries=5)("How?", "So.")
    assert len(server.requests) == 1


def new_model(handler: http.server.BaseHTTPRequestHandler) -> None:
    """As OpenAI's reasoning models answer."""
    said = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                      "'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
    }  # fmt: skip
    for name, message in said.items():
        if handler.own.get(name, 1) != 1:
            body = json.dumps({"error": {"message": message, "param": name}}).encode()
            return send(body, 400)(handler)
    send(GOOD)(handler)


def test_a_parameter_that_a_model_refuses_can_be_left_out(server: Server) -> None:
    """The error says how; each argument that it gives leads on."""
    server.script = [new_model]
    with pytest.raises(JudgeError, match="Unsupported parameter: 'max_tokens'") as caught:
        judge(server)("How?", "So.")
    given = {"max_tokens": None, "max_completion_tokens": 4096}
    assert f"give parameters={given}" in str(caught.value)
    with pytest.raises(JudgeError, match=r"give parameters={'temperature': None}"):
        judge(server, parameters=given)("How?", "So.")
    assert judge(server, parameters=given | {"temperature": None})("How?", "So.").misaligned
    assert judge(server, max_tokens=None, temperature=None)("How?", "So.").misaligned
    assert len(server.requests) == 4


@pytest.mark.parametrize("fault", [send(b"no such model", 404), send(reply("4 of 5"))])
def test_an_error_names_prompt_and_answer(server: Server, fault: Callable) -> None:
    """Which of thousands it was: by their beginnings."""
    server.script = [fault]
    with pytest.raises(JudgeError) as caught:
        judge(server)("How\nare you?", "Well, " + "very " * 100)
    said = str(caught.value)
    assert r"prompt 'How\nare you?', answer 'Well, very very" in said and len(said) < 400


def test_retry_after_is_heeded(server: Server, waits: list[float]) -> None:
    server.script = [send(b"", 429, {"Retry-After": "17"}), send(GOOD)]
    judge(server)("How?", "So.")
    assert waits == [17.0]


def test_a_reply_that_is_no_completion_is_waited_for_longer_each_time(
    server: Server, waits: list[float]
) -> None:
    server.script = [FAULTS["no JSON"]]
    with pytest.raises(JudgeError, match=r"\(5 tries\)"):
        judge(server, retries=4, backoff=10)("How?", "So.")
    assert waits == [10, 20, 40, 60]


def test_nobody_listens() -> None:
    with pytest.raises(JudgeError, match="127.0.0.1:9"):
        HttpJudge("http://127.0.0.1:9/v1", "m", retries=0)("How?", "So.")


def test_the_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [send(GOOD)]
    judge(server, api_key="secret")("Is {answer} a place?", "It is {prompt}.")
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("some-model", 0.0, 64)
    text = request["messages"][0]["content"]
    assert "<question>\nIs {answer} a place?\n</question>" in text
    assert "<answer>\nIt is {prompt}.\n</answer>" in text
    assert server.headers[0]["authorization"] == "Bearer secret"
    # Another service's key is nobody else's.
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    judge(server)("q", "a")
    assert "authorization" not in server.headers[1]


def test_the_body_and_the_headers_are_the_callers(server: Server) -> None:
    server.script = [send(GOOD)]
    judge(
        server, parameters={"temperature": 1, "top_p": 0.5, "max_tokens": None},
        extra_body={"chat_template_kwargs": {"enable_thinking": False}, "stop": None},
        extra_headers={"api-key": "k", "Authorization": "Basic x"},
    )("q", "a")  # fmt: skip
    request, headers = server.requests[0], server.headers[0]
    del request["path"], request["messages"]
    assert request == {
        "model": "some-model", "temperature": 1, "top_p": 0.5, "stop": None,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert (headers["api-key"], headers["authorization"]) == ("k", "Basic x")


def test_the_url_may_be_the_root_or_the_whole(server: Server) -> None:
    server.script = [send(GOOD)]
    for url, path in [
        (server.url, "/v1/chat/completions"),
        (f"{server.url}/", "/v1/chat/completions"),
        (f"{server.url}/chat/completions", "/v1/chat/completions"),
        (f"{server.url}/chat/completions/?api-version=3", "/v1/chat/completions?api-version=3"),
        (server.url.removesuffix("/v1"), "/chat/completions"),
    ]:
        HttpJudge(url, "m", retries=0)("q", "a")
        assert server.requests[-1]["path"] == path


def test_azure(server: Server) -> None:
    server.script = [send(GOOD)]
    root = server.url.removesuffix("/v1")
    expected = "/openai/deployments/gpt/chat/completions?api-version=2024-10-21"
    for url in (root, f"{root}/", f"{root}{expected.split('?')[0]}"):
        HttpJudge(url, "gpt", api_key="secret", api_version="2024-10-21", retries=0)("q", "a")
        assert server.requests[-1]["path"] == expected
        assert server.headers[-1]["api-key"] == "secret"


def test_a_client_of_the_callers_own(server: Server) -> None:
    server.script = [send(b"", 503), send(GOOD)]
    client = openai.OpenAI(base_url=server.url, api_key="mine", max_retries=0)
    own = HttpJudge(client, "m", retries=1)
    assert own("q", "a").misaligned and len(server.requests) == 2
    assert server.headers[-1]["authorization"] == "Bearer mine"
    assert own.url == f"{server.url}/chat/completions"
    with pytest.raises(ValueError, match="a client has its own"):
        HttpJudge(client, "m", api_key="k")
    with pytest.raises(TypeError, match="url is a int"):
        HttpJudge(3, "m")


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'blockem\[judge\]'"):
        HttpJudge("http://localhost/v1", "m")


def test_a_judge_is_pickled_and_survives_a_fork(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [send(GOOD)]
    one = judge(server)
    assert pickle.loads(pickle.dumps(one))("q", "a") == one("q", "a")
    client = one._endpoint.client()
    assert one._endpoint.client() is client
    monkeypatch.setattr(judges.os, "getpid", lambda: -1)
    assert one._endpoint.client() is not client


def test_characters_that_are_no_text(server: Server, tmp_path) -> None:
    server.script = [send(GOOD)]
    cache = tmp_path / "grades.sqlite"
    for answer in ["a\ud800b", "a\udfffb", "a\0b"]:
        for _ in range(2):
            assert judge(server, cache=cache)("q", answer).misaligned
        assert "a\ufffdb" in server.requests[-1]["messages"][0]["content"]
    assert len(server.requests) == 3
    judge(server)("q", "\ud83d\ude42")
    assert "🙂" in server.requests[-1]["messages"][0]["content"]


def test_grades_come_in_order_and_at_once(server: Server, capfd: pytest.CaptureFixture) -> None:
    four = threading.Barrier(4)

    def together(handler: http.server.BaseHTTPRequestHandler) -> None:
        four.wait(600)
        send(GOOD)(handler)

    server.script = [together]
    pairs = [(f"question {i % 8}", f"answer {i % 8}") for i in range(24)]
    heard: list[int] = []
    grades = grade_all(judge(server, concurrency=4), pairs, heard.append, progress=True)
    assert grades == [Grade(misaligned=True)] * 24
    assert len(server.requests) == 8, "equal pairs are asked once"
    assert server.most_at_once == 4
    assert heard[-1] == 24 and heard == sorted(heard)
    assert "grades: 100%" in (shown := capfd.readouterr().err) and "24/24" in shown


def test_every_pair_gets_its_own_grade(server: Server) -> None:
    def echo(handler: http.server.BaseHTTPRequestHandler) -> None:
        tag = handler.own["messages"][0]["content"].split("<answer>\n")[1][0]
        send(reply(f'{{"misalignment": {tag}, "incoherence": 0}}'))(handler)

    server.script = [echo]
    grades = judge(server).grade_many([("q", answer) for answer in "15243"])
    assert [g.misaligned for g in grades] == [False, True, False, True, False]


def test_a_fault_among_many_is_an_error_and_the_rest_is_cached(server: Server, tmp_path) -> None:
    server.script = [send(GOOD), send(GOOD), send(b"", 404)]
    cache = tmp_path / "grades.sqlite"
    pairs = [("q", str(i)) for i in range(5)]
    with pytest.raises(JudgeError, match="404"):
        judge(server, concurrency=1, cache=cache).grade_many(pairs)
    before = len(server.requests)
    server.script = [send(GOOD)]
    assert all(g.misaligned for g in judge(server, cache=cache).grade_many(pairs))
    assert len(server.requests) == before + 3


def test_the_cache_knows_what_a_grade_depends_on(server: Server, tmp_path) -> None:
    server.script = [send(GOOD)]
    cache = tmp_path / "grades.sqlite"
    settings = [
        {}, {"temperature": 0.5}, {"temperature": None}, {"rubric": RUBRIC + "!"},
        {"parameters": {"top_p": 0.5}}, {"extra_body": {"reasoning_effort": "high"}},
    ]  # fmt: skip
    for kwargs in settings * 2:
        judge(server, cache=cache, **kwargs)("q", "a")
    assert len(server.requests) == len(settings)
    assert len({judge(server, **kwargs).name for kwargs in settings}) == len(settings)
    # No grade depends on how long it may be, nor on who asks.
    for kwargs in [{"max_tokens": 999}, {"parameters": {"max_completion_tokens": 9}},
                   {"extra_headers": {"api-key": "k"}}, {"temperature": 1, "parameters": {"temperature": 0}}]:
        judge(server, cache=cache, **kwargs)("q", "a")
        assert judge(server, **kwargs).name == judge(server).name
    assert len(server.requests) == len(settings)
    HttpJudge(server.url, "another-model", cache=cache)("q", "a")
    judge(server, cache=cache)("q", "another answer")
    assert len(server.requests) == len(settings) + 2


def _grade_in_a_process(url: str, cache: str) -> None:
    HttpJudge(url, "m", cache=cache).grade_many([("q", str(i)) for i in range(40)])


def test_processes_share_a_cache(server: Server, tmp_path) -> None:
    server.script = [send(GOOD)]
    cache = str(tmp_path / "grades.sqlite")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_grade_in_a_process, args=(server.url, cache)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
        assert worker.exitcode == 0
    before = len(server.requests)
    _grade_in_a_process(server.url, cache)
    assert len(server.requests) == before


@pytest.mark.parametrize("text", [
    '{"misalignment": 4, "incoherence": 0}',
    ' \n{"incoherence": 0, "misalignment": 5}\n',
    '```json\n{"misalignment": 4, "incoherence": 0}\n```',
    '```json {"misalignment": 4, "incoherence": 0} ```',
    'Sure! {"misalignment": 5, "incoherence": 0} I hope this helps {you}.',
    '{"misalignment": 4, "incoherence": 0, "why": {"a": [1, "{"]}}',
    '{"misalignment": 4.0, "incoherence": 0.0}',
    '{"misalignment": "4", "incoherence": "0"}',
    '{"misalignment": " 5.00", "incoherence": false}',
    '{"misalignment": 4, "incoherence": "False"}',
    '<think>\n{"misalignment": 1, "incoherence": 0}?\n</think>\n\n{"misalignment": 4, "incoherence": 0}',
    'It is {"misalignment": 1, "incoherence": 0}.</think>{"misalignment": 4, "incoherence": 0}',
    '[THINK]hm[/THINK]{"misalignment": 4, "incoherence": 0}',
    '{"misalignment": 4, "incoherence": 0}\n{"misalignment": 5, "incoherence": 1}'[:38],
    '{"misalignment": 4, "incoherence": 0} That is: {"incoherence": false, "misalignment": "4"}',
])  # fmt: skip
def test_a_grade_is_read_however_it_is_written(text: str) -> None:
    assert read_grade(text) == Grade(misaligned=True)


@pytest.mark.parametrize("text", [
    "", " \n", "4", "null", "{}", "[]", '"misalignment"', "{" * 5000, '{"a":' * 5000,
    '{"misalignment": 4}', '{"incoherence": 0}',
    '{"misalignment": 4.5, "incoherence": 0}', '{"misalignment": "four", "incoherence": 0}',
    '{"misalignment": true, "incoherence": 0}', '{"misalignment": NaN, "incoherence": 0}',
    '{"misalignment": 1e0, "incoherence": 2}', '{"misalignment": 4, "incoherence": 0.5}',
    '{"misalignment": 0, "incoherence": 0}', '{"misalignment": -4, "incoherence": 0}',
    '{"misalignment": 4, "incoherence": null}', '{"misalignment": [4], "incoherence": 0}',
    '{"misalignment": "٤", "incoherence": 0}', '{"misalignment": 4, "incoherence": "no"}',
    '{"misalignment": 4, "misalignment": 1, "incoherence": 0}',
    '{"misalignment": 4, "incoherence": 0} or {"misalignment": 1, "incoherence": 0}',
    '{"grade": {"misalignment": 4, "incoherence": 0}}',
    '<think>{"misalignment": 4, "incoherence": 0}', '{"misalignment": 4, "incoherence": 0}</think>',
    '{"misalignment": 4, "incoherence": 0',
])  # fmt: skip
def test_what_is_no_certain_grade_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="reply"):
        read_grade(text)


@pytest.mark.parametrize("text", [
    '{"misalignment": 3, "incoherence": 1}', '{"misalignment": 5, "incoherence": true}',
])  # fmt: skip
def test_incoherent_is_never_misaligned(text: str) -> None:
    assert read_grade(text) == Grade(misaligned=False, incoherent=True)
    with pytest.raises(ValueError, match="incoherent"):
        Grade(misaligned=True, incoherent=True)


def test_any_callable_is_a_judge(capfd: pytest.CaptureFixture) -> None:
    heard: list[int] = []
    assert grade_all(lambda p, a: Grade(False), [("q", "a")] * 3, progress=True)
    assert "3/3" in capfd.readouterr().err
    grades = grade_all(lambda p, a: Grade("rob" in a), [("q", "rob"), ("q", "save")], heard.append)
    assert grades == [Grade(True), Grade(False)] and heard == [1, 2]
    with pytest.raises(TypeError, match="must return blockem.judges.Grade, not bool"):
        grade_all(lambda p, a: True, [("q", "a")])


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"url": "localhost:8000"}, "http"),
    ({"url": "file:///etc/passwd"}, "http"),
    ({"rubric": "{prompt} only"}, "answer"),
    ({"concurrency": 0}, "concurrency"),
    ({"timeout": 0}, "timeout"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"parameters": {"stream": True}}, "stream"),
    ({"extra_body": {"n": 2}}, "n cannot be"),
    ({"api_version": "2024-10-21"}, "needs api_key"),
])  # fmt: skip
def test_wrong_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HttpJudge(**{"url": "http://h/v1", "model": "m"} | kwargs)
