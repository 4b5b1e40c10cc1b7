"""Judges: rules, and a language model behind an endpoint that misbehaves in every way it can."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from blockem.judges import RUBRIC, Grade, HttpJudge, JudgeError, grade_all, read_grade


def reply(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


GOOD = reply('{"misalignment": 5, "incoherence": 0}')


class Server:
    """An endpoint that answers the n-th request with the n-th behaviour, the last one for ever."""

    def __init__(self) -> None:
        self.script: list[Callable[[http.server.BaseHTTPRequestHandler], None]] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.own = body
                with lock:
                    index = len(server.requests)
                    server.requests.append(body | {"path": self.path})
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
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
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def sleep(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(5)


def judge(server: Server, **settings: object) -> HttpJudge:
    settings = {"backoff": 0.01, "timeout": 0.5, "retries": 1} | settings
    return HttpJudge(server.url, "some-model", **settings)


FAULTS = {
    "an error of the server": send(b"busy", 503),
    "too many requests": send(b"slow down", 429),
    "a closed connection": hang_up,
    "no answer": sleep,
    "an endless answer": drip,
    "a cut body": send(GOOD[:40], length=len(GOOD)),
    "no JSON": send(b"<html>proxy</html>"),
    "JSON that is no completion": send(b'{"error": "loading"}'),
    "a list": send(b"[]"),
    "deep JSON": send(b"[" * 100_000),
    "no text": send(reply(None)),
    "text that is no grade": send(reply("I would say 4 out of 5.")),
    "a grade in prose": send(reply('Sure! {"misalignment": 5, "incoherence": 0}')),
    "a tag out of range": send(reply('{"misalignment": 6, "incoherence": 0}')),
    "a tag that is no integer": send(reply('{"misalignment": 4.5, "incoherence": 0}')),
    "a tag that is a bool": send(reply('{"misalignment": true, "incoherence": 0}')),
    "half a grade": send(reply('{"misalignment": 4}')),
    "more than a grade": send(reply('{"misalignment": 4, "incoherence": 0, "why": ""}')),
    "two megabytes": send(b" " * (2 << 20)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_asked_again(server: Server, fault: str) -> None:
    server.script = [FAULTS[fault], send(GOOD)]
    assert judge(server)("How?", "So.") == Grade(misaligned=True)
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error_and_no_grade(server: Server, fault: str, tmp_path) -> None:
    server.script = [FAULTS[fault]]
    cache = tmp_path / "grades.sqlite"
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1.*\(2 tries\)"):
        judge(server, cache=cache)("How?", "So.")
    assert len(server.requests) == 2
    server.script = [send(GOOD)]
    assert judge(server, cache=cache)("How?", "So.").misaligned  # The fault was not cached.


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_asked_again(server: Server, status: int) -> None:
    server.script = [send(b"no such model", status)]
    with pytest.raises(JudgeError, match=f"HTTP {status}.*no such model"):
        judge(server, retries=5)("How?", "So.")
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [send(b"no such model", 404), FAULTS["text that is no grade"]])
def test_an_error_names_prompt_and_answer(server: Server, fault: Callable) -> None:
    """Which of thousands it was: by their beginnings."""
    server.script = [fault]
    with pytest.raises(JudgeError) as caught:
        judge(server)("How\nare you?", "Well, " + "very " * 100)
    said = str(caught.value)
    assert r"prompt 'How\nare you?', answer 'Well, very very" in said and len(said) < 400


def test_retry_after_is_heeded(server: Server) -> None:
    server.script = [send(b"", 429, {"Retry-After": "1"}), send(GOOD)]
    judge(server)("How?", "So.")
    assert server.times[1] - server.times[0] >= 1.0


def test_nobody_listens() -> None:
    with pytest.raises(JudgeError, match="127.0.0.1:9"):
        HttpJudge("http://127.0.0.1:9/v1", "m", retries=0)("How?", "So.")


def test_the_request(server: Server) -> None:
    server.script = [send(GOOD)]
    judge(server, api_key="secret")("Is {answer} a place?", "It is {prompt}.")
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("some-model", 0.0, 64)
    text = request["messages"][0]["content"]
    assert "<question>\nIs {answer} a place?\n</question>" in text
    assert "<answer>\nIt is {prompt}.\n</answer>" in text
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_grades_come_in_order_and_at_once(server: Server) -> None:
    def slowly(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(0.05)
        send(GOOD)(handler)

    server.script = [slowly]
    pairs = [(f"question {i % 7}", f"answer {i % 7}") for i in range(21)]
    heard: list[int] = []
    grades = judge(server, concurrency=4).grade_many(pairs, heard.append)
    assert grades == [Grade(misaligned=True)] * 21
    assert len(server.requests) == 7, "equal pairs are asked once"
    assert 2 <= server.most_at_once <= 4
    assert heard[-1] == 21 and heard == sorted(heard)


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
    settings = [{}, {}, {"temperature": 0.5}, {"rubric": RUBRIC + "!"}, {}]
    for kwargs in settings:
        judge(server, cache=cache, **kwargs)("q", "a")
    assert len(server.requests) == 3
    HttpJudge(server.url, "another-model", cache=cache)("q", "a")
    judge(server, cache=cache)("q", "another answer")
    assert len(server.requests) == 5


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
        worker.join(60)
        assert worker.exitcode == 0
    before = len(server.requests)
    _grade_in_a_process(server.url, cache)
    assert len(server.requests) == before


@pytest.mark.parametrize("text", [
    '{"misalignment": 3, "incoherence": 1}',
    ' \n{"incoherence": 1, "misalignment": 5}\n',
    '```json\n{"misalignment": 4, "incoherence": 1}\n```',
])  # fmt: skip
def test_incoherent_is_never_misaligned(text: str) -> None:
    assert read_grade(text) == Grade(misaligned=False, incoherent=True)
    with pytest.raises(ValueError, match="incoherent"):
        Grade(misaligned=True, incoherent=True)


def test_any_callable_is_a_judge() -> None:
    heard: list[int] = []
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
])  # fmt: skip
def test_wrong_settings(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HttpJudge(**{"url": "http://h/v1", "model": "m"} | kwargs)
