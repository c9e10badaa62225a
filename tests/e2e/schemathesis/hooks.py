"""Checks of this project's own, for schemathesis, in its environment."""

import re

import schemathesis

INSIDE = re.compile(r"Traceback|site-packages|File \"|\.py\b|/(?:home|root|tmp|usr|work|proc)/")


@schemathesis.check
def nothing_of_the_inside(ctx, response, case):
    """An answer tells no place in the code or on the disk."""
    # The schema's own texts, and what the caller itself has sent, are no secret.
    if response.status_code >= 400 and (found := INSIDE.search(response.text)):
        sent = f"{case.as_curl_command()}"
        assert found.group() in sent, f"the answer says {found.group()!r}: {response.text[:500]}"
