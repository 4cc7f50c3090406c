"""Recognizes credentials, by their name or by themselves: no file of a run and no launch file may carry one."""

import os
import re

# Words between underscores, and parts of words that name nothing else.
_NAME = re.compile(
    r"(^|_)(PAT|PWD|PW|PASS|JWT|KEYS?|AUTH|DSN|CREDS?|COOKIES?|SIGNATURE|SAS)(_|\d*$)"
    r"|SECRET|TOKEN|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY"
    r"|DATABASE_?UR[IL]|CONNECTION_?STRING|WEBHOOK",
    re.IGNORECASE,
)
_PLAIN = {"PWD", "OLDPWD"}  # a shell's working folders
_VALUE = re.compile(
    r"://[^/\s]*:[^/\s]*@"  # an address with a password
    r"|-----BEGIN [A-Z ]*PRIVATE"
    r"|\b(AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[oprsu]_\w{30,}|\bgithub_pat_\w{20,}|\bhf_\w{30,}|\bglpat-[\w-]{16,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}"  # a JSON web token
    r"|\b(password|passwd|pwd|token|secret|api_?key|account_?key|shared_?access_?\w+)=[^\s;&]",
    re.IGNORECASE,
)
_SHORTEST = 8  # characters of a value that is looked for inside of others: a shorter one is there by chance


def is_credential_name(name: str) -> bool:
    """Whether an environment variable of this name most likely holds a credential."""
    return name.upper() not in _PLAIN and _NAME.search(name) is not None


def holds_credential(text: str) -> bool:
    """Whether a text has the form of a credential, or holds one: a password in an address, a key, a token."""
    return _VALUE.search(text) is not None


def variable_within(text: str) -> str | None:
    """The environment variable that holds a credential and whose value is in ``text``, however it came there."""
    held = ((name, value) for name, value in os.environ.items() if len(value) >= _SHORTEST and value in text)
    return next((name for name, value in held if is_credential_name(name) or holds_credential(value)), None)
