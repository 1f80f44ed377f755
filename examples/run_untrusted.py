#!/usr/bin/env python3
"""Runs a snippet that nobody trusts, in a VM of its own, with a time limit.

    echo 'print(6 * 7)' | run_untrusted.py --template base --seconds 5

The snippet is read from standard input and handed to an interpreter in the VM, as an unprivileged
user. What it prints is printed, and its exit code is ours: 124 where its time was over, 128 and the
signal's number where a signal ended it, 125 where Army could not run it. The VM is destroyed in any
case, at the latest by its time to live. Asks the server at ARMY_URL with the key in ARMY_KEY.

Python's standard library alone; docs/guides/untrusted-code.md tells what the template should be.
"""

import argparse
import json
import os
import sys
import urllib.error
import urllib.request

FAILED, TIMED_OUT, SIGNALLED = 125, 124, 128
# What the VM may live beyond the snippet's time: to be made, and to be destroyed.
SPARE_SECONDS = 60
# What Army may take beyond that to answer.
PATIENCE = 120


def ask(method, path, body=None, seconds=0):
    """One request; the answer as it was in JSON."""
    request = urllib.request.Request(
        os.environ.get("ARMY_URL", "http://127.0.0.1:7777") + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Authorization": "Bearer " + os.environ["ARMY_KEY"],
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=seconds + PATIENCE) as answer:
        return json.load(answer)


def run(options, snippet):
    wanted = {"template": options.template, "ttl_s": options.seconds + SPARE_SECONDS}
    vm = ask("POST", "/v1/vms", wanted)["vms"][0]["id"]
    try:
        command = {
            "command": options.interpreter,
            "stdin": snippet,
            "user": options.user,
            "directory": "/tmp",
            "timeout_ms": options.seconds * 1000,
        }
        return ask("POST", f"/v1/vms/{vm}/exec", command, options.seconds)
    finally:
        ask("DELETE", f"/v1/vms/{vm}")


def main():
    parser = argparse.ArgumentParser(description="Run a snippet in a VM of its own.")
    parser.add_argument("--template", required=True, help="what is forked: a template or a tag")
    parser.add_argument("--seconds", type=int, default=10, help="its time limit (default: 10)")
    parser.add_argument("--user", default="65534", help="as whom, a name or a number (default: 65534, Debian's nobody)")
    parser.add_argument(
        "interpreter", nargs="*", default=["python3", "-"], help="what runs it (default: python3 -)"
    )
    options = parser.parse_args()
    try:
        result = run(options, sys.stdin.read())
    except urllib.error.HTTPError as refused:
        problem = json.load(refused)
        print(f"run_untrusted: {problem['detail']}", file=sys.stderr)
        return FAILED
    except (OSError, KeyError) as error:
        print(f"run_untrusted: {error!r}", file=sys.stderr)
        return FAILED
    sys.stdout.write(result["stdout"])
    sys.stderr.write(result["stderr"])
    if result["timed_out"]:
        print(f"run_untrusted: the time limit of {options.seconds} s is over", file=sys.stderr)
        return TIMED_OUT
    if "signal" in result:
        return SIGNALLED + result["signal"]
    return result["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
