#!/usr/bin/env python3
"""Runs jobs, each in a VM of its own that is forked for it, side by side.

    ci_runner.py --template base SOURCES JOB [JOB ...]

SOURCES is a directory that each VM gets a copy of; a JOB is a shell command that runs in it. What
jobs print is printed as they go, with their number. Ends with 0 if all passed, and 1 if not. Asks
the server at ARMY_URL with the key in ARMY_KEY.

Python's standard library alone; docs/guides/ci-runners.md tells more.
"""

import argparse
import http.client
import io
import json
import os
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor

# A connection that says nothing for so long is given up; an idle stream of events says something
# every few seconds.
SILENCE = 60
# How long Army may be away before a job is given up, in seconds: restarts take their time.
PATIENCE = 300
# Where the sources are in a VM.
WORK = "/root/work"
# How a connection breaks: an answer that is cut short is no OSError.
BROKEN = (OSError, http.client.HTTPException)


class Failed(Exception):
    """Army does not do what it was asked for; says why."""


def open_url(method, path, data=None, kind="application/json", headers=()):
    request = urllib.request.Request(
        os.environ.get("ARMY_URL", "http://127.0.0.1:7777") + path,
        method=method,
        data=data,
        headers={
            "Authorization": "Bearer " + os.environ["ARMY_KEY"],
            "Content-Type": kind,
            **dict(headers),
        },
    )
    return urllib.request.urlopen(request, timeout=SILENCE)


def ask(method, path, body=None, **more):
    """A request that may be sent again: Army does it once, or it does no harm twice."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with open_url(method, path, data, **more) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as refused:
            problem = json.load(refused)
            wait = problem.get("retry_after_s")
            if wait is None or time.monotonic() > end:
                raise Failed(problem["detail"]) from refused
            time.sleep(wait)
        except BROKEN as lost:
            if time.monotonic() > end:
                raise Failed(f"Army does not answer: {lost}") from lost
            time.sleep(1)


def read_output(path, show):
    """Shows what a command writes until it ends, and returns how; reads on where it was cut off."""
    cursors = {"stdout": 0, "stderr": 0}
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with open_url("GET", f"{path}/output?{urllib.parse.urlencode(cursors)}") as stream:
                for line in stream:
                    end = time.monotonic() + PATIENCE
                    if not line.startswith(b"data: "):
                        continue
                    event = json.loads(line[len(b"data: ") :])
                    if event["kind"] == "ended":
                        return event
                    if event["kind"] == "output":
                        cursors[event["stream"]] = event["cursor"]
                        show(event["stream"], event["text"])
                    if event["kind"] == "lost":
                        # The guest keeps 256 KiB that nobody reads, and nobody read.
                        show(event["stream"], f"[{event['bytes']} bytes of output are lost]\n")
        except urllib.error.HTTPError as refused:
            # What is the server's own trouble may pass.
            if refused.code < 500:
                raise Failed(json.load(refused)["detail"]) from refused
        except BROKEN:
            pass  # read on
        time.sleep(1)
    raise Failed("the job's output cannot be read")


class Lines:
    """Prints whole lines, with the job's number before each."""

    def __init__(self, prefix):
        self.prefix, self.rest = prefix, {"stdout": "", "stderr": ""}

    def show(self, stream, text):
        *whole, self.rest[stream] = (self.rest[stream] + text).split("\n")
        for line in whole:
            print(self.prefix + line, flush=True)

    def end(self):
        for stream in self.rest:
            if self.rest[stream]:
                self.show(stream, "\n")


def packed(directory):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(directory, arcname=".")
    return buffer.getvalue()


def run_job(options, number, job, sources):
    """Runs one job; returns what became of it in words, '' where it passed."""
    wanted = {
        "template": options.template,
        "labels": {"ci-job": str(number)},
        "ttl_s": options.minutes * 60 + 120,
    }
    key = [("Idempotency-Key", str(uuid.uuid4()))]
    vm = ask("POST", "/v1/vms", wanted, headers=key)["vms"][0]["id"]
    try:
        path = f"/v1/vms/{vm}"
        ask("PUT", f"{path}/files?path=/tmp/sources.tar.gz", sources, kind="application/octet-stream")
        unpack = f"mkdir -p {WORK} && tar -xzf /tmp/sources.tar.gz -C {WORK}"
        unpacked = ask("POST", f"{path}/exec", {"command": ["sh", "-c", unpack]})
        if unpacked.get("exit_code") != 0:
            raise Failed(f"the sources cannot be unpacked: {unpacked['stderr']}")
        command = {
            "command": ["sh", "-c", job],
            "directory": WORK,
            "environment": {"CI": "true"},
            "timeout_ms": options.minutes * 60_000,
        }
        # Sent once: it would run twice.
        started = start(f"{path}/commands", command)
        lines = Lines(f"job {number}: ")
        ended = read_output(f"{path}/commands/{started['id']}", lines.show)
        lines.end()
    finally:
        ask("DELETE", f"/v1/vms/{vm}")
    if ended["timed_out"]:
        return f"stopped after {options.minutes} min"
    if "signal" in ended:
        return f"killed by signal {ended['signal']}"
    return f"failed with {ended['exit_code']}" if ended["exit_code"] else ""


def start(path, command):
    try:
        with open_url("POST", path, json.dumps(command).encode()) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refused:
        raise Failed(json.load(refused)["detail"]) from refused
    except BROKEN as lost:
        raise Failed(f"the answer to its start was lost: {lost}") from lost


def main():
    parser = argparse.ArgumentParser(description="Run jobs, each in a VM of its own.")
    parser.add_argument("--template", required=True, help="what is forked: a template or a tag")
    parser.add_argument("--minutes", type=int, default=60, help="a job's limit (default: 60)")
    parser.add_argument("--at-once", type=int, default=4, help="jobs at a time (default: 4)")
    parser.add_argument("sources", help="the directory that jobs get")
    parser.add_argument("jobs", nargs="+", metavar="job", help="a shell command")
    options = parser.parse_args()
    if "ARMY_KEY" not in os.environ:
        parser.error("set ARMY_KEY to a key of Army's")
    sources = packed(options.sources)

    def run(numbered):
        number, job = numbered
        begin = time.monotonic()
        try:
            outcome = run_job(options, number, job, sources)
        except Failed as failure:
            outcome = f"not run: {failure}"
        return number, outcome, time.monotonic() - begin

    with ThreadPoolExecutor(options.at_once) as pool:
        outcomes = list(pool.map(run, enumerate(options.jobs, 1)))
    for number, outcome, seconds in outcomes:
        print(f"job {number}: {outcome or 'passed'} in {seconds:.1f} s")
    return 1 if any(outcome for _, outcome, _ in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
