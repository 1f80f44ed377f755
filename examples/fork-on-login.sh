#!/bin/sh
# A VM for each login: forks one, opens a shell in it (or runs the command that ssh was given), and
# destroys it at the end. Made to be sshd's ForceCommand; docs/guides/dev-environments.md tells how.
#
# Needs `army`, and from the environment or /etc/default/fork-on-login: ARMY_URL, ARMY_KEY, and
# ARMY_TEMPLATE, what is forked.
set -eu

settings=/etc/default/fork-on-login
if [ -r "$settings" ]; then
    set -a
    . "$settings"
    set +a
fi
: "${ARMY_KEY:?it is not set}" "${ARMY_TEMPLATE:?it is not set}"

user=$(id -un | tr -cd 'a-z0-9')
vm="login-$user-$$"

# Whatever ends the login: the end, a lost connection, a signal. And where not even this script is
# left, the time to live ends it.
trap 'army vm rm "$vm" >/dev/null 2>&1' EXIT
trap 'exit 129' HUP INT TERM
army vm create "$ARMY_TEMPLATE" --name "$vm" --label "login=$user" --ttl 43200 >/dev/null

if [ -n "${SSH_ORIGINAL_COMMAND:-}" ]; then
    army exec "$vm" -- sh -c "$SSH_ORIGINAL_COMMAND"
else
    army shell "$vm"
fi
