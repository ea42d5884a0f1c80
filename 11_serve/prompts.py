"""How a chat is written down for a model: its template, a program of a stranger's, in a sandbox.

What it teaches: what a user types is text, whatever it looks like, and may be made to do harm: a
name of a special token, a word of a million letters. The rest is told in 04_modern/chat.py.

Parent: 04_modern/chat.py (ChatTemplate, environment)
New: QuickTokenizer
"""

import heapq
import importlib
import json
from datetime import datetime
from pathlib import Path

from common import CHARS, Tokenizer

ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # end a turn or a text in most vocabularies
THOUGHTS = ("<think>", "</think>")  # what a template may look for in the model's own messages
# For a base model, which has no template: a transcript, as it has read many.
TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: "
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class ChatTemplate:
    """The template of a model directory: chat_template.jinja or that in tokenizer_config.json.

    Where there is none, as for a base model, `plain` is true and a chat is a transcript of "User:
    ..." and "Assistant: ..." lines, which `stop`, strings that end an answer, keeps to one answer.
    Raises ValueError for a file that cannot be read or a template that is not Jinja."""

    def __init__(self, directory=None):
        names = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
        try:
            paths = [Path(directory, name) for name in names] if directory else []
            texts = {p.name: p.read_text(encoding="utf-8") for p in paths if p.exists()}
            config, generation = (json.loads(texts.get(name, "{}")) for name in names[:2])
            source = texts.get(names[2]) or config.get("chat_template")
            if isinstance(source, list):  # several with names, for tools or retrieval
                named = {entry["name"]: entry["template"] for entry in source}
                source = named.get("default") or next(iter(named.values()))
            self.plain, self.source = not source, source or TRANSCRIPT
            self.stop = ("\nUser:",) if self.plain else ()
            texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items()}
            self.special = {
                k: v for k, v in texts.items() if k.endswith("_token") and isinstance(v, str)
            }
            ends = generation.get("eos_token_id")
            self.ends = set(ends if isinstance(ends, list) else [ends]) - {None}
            self.template = environment().from_string(self.source)
        except ImportError:
            raise
        except Exception as error:  # whatever is wrong with the files
            raise ValueError(f"{directory} has no whole chat template: {error!r}") from None

    def render(self, messages, add_generation_prompt=True):
        """The text of a list of {"role": ..., "content": ...}; with add_generation_prompt it ends
        where the assistant begins. Raises ValueError where the template refuses or fails."""
        try:
            prompt = {"add_generation_prompt": add_generation_prompt, "tools": None}
            return self.template.render(self.special | prompt, messages=messages, documents=None)
        except Exception as error:  # a stranger's code can raise anything
            raise ValueError(f"the chat template failed: {error}") from None

    def encode(self, messages, tokenizer, add_generation_prompt=True):
        """The ids of the messages. A special token's name in a message is text; only those that the
        template itself writes become the token."""
        said = json.dumps(messages, ensure_ascii=False) + self.source
        mark = next(chr(c) for c in range(0xE000, 0xF900) if chr(c) not in said)

        def broken(value, names):  # a mark inside each name that is found in a string
            if isinstance(value, dict):
                return {k: broken(v, names) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [broken(v, names) for v in value]
            for name in names if isinstance(value, str) else ():
                value = value.replace(name, name[:1] + mark + name[1:])
            return value

        ids, special = [], tokenizer.special
        names = {name for name in special if len(name.strip()) > 1}  # some have runs of spaces
        own = names - set(THOUGHTS)
        messages = [broken(m, own if m["role"] == "assistant" else names) for m in messages]
        for part in tokenizer.special_pattern.split(self.render(messages, add_generation_prompt)):
            text = part.replace(mark, "")
            ids += [special[part]] if part in special else tokenizer.encode(text, special=False)
        return ids

    def stops(self, tokenizer):
        """The ids that end an answer: eos_token, eos_token_id of generation_config.json, and
        <|im_end|>, <|eot_id|> and <|endoftext|> where the vocabulary has them."""
        names = (*ENDS, self.special.get("eos_token"))
        return self.ends | {tokenizer.special[name] for name in names if name in tokenizer.special}


def environment():
    """Jinja as `transformers` sets it up, in a sandbox: no attribute that leads out of the data."""
    jinja2 = importlib.import_module("jinja2")
    sandbox, ext = map(importlib.import_module, ("jinja2.sandbox", "jinja2.ext"))

    class Generation(ext.Extension):
        """{% generation %}, which marks what to train on: here only what is in it counts."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # Jinja's own would escape < and >
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    result = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    result.filters["tojson"] = tojson
    result.globals["raise_exception"] = raise_exception
    result.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return result


class QuickTokenizer(Tokenizer):
    """common's, made safe for the text of strangers: a word of n letters takes n log n steps where
    common's takes n², and is not kept in memory."""

    def merge(self, piece):
        """The ids of one piece: its pairs joined, the one of lowest rank first."""
        if len(piece) <= 64:
            return super().merge(piece)
        text = "".join(CHARS[byte] for byte in piece.encode())
        if self.whole and text in self.ids:
            return [self.ids[text]]
        parts = list(self.lost.sub("" if self.unknown is None else "\0", text))
        after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap = []

        def push(i, j):
            if (
                i >= 0
                and j < len(parts)
                and (rank := self.ranks.get((parts[i], parts[j]))) is not None
            ):
                heapq.heappush(heap, (rank, i, parts[i], parts[j]))

        for i in range(len(parts) - 1):
            push(i, i + 1)
        while heap:
            _, i, a, b = heapq.heappop(heap)
            j = after[i]
            if parts[i] != a or j >= len(parts) or parts[j] != b:
                continue  # one of the two is part of something else by now
            parts[i], parts[j] = a + b, None
            after[i] = after[j]
            if after[i] < len(parts):
                before[after[i]] = i
            push(before[i], i)
            push(i, after[i])
        return [self.ids.get(part, self.unknown) for part in parts if part is not None]
