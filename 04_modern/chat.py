"""Talking to a model: its chat template, a cache kept from turn to turn, and the terminal loop.

What it teaches: a chat is one long text. The model was tuned on one way to write who speaks, and
that is a Jinja template in tokenizer_config.json: code from a stranger, so it runs in a sandbox.
The tokens that end a turn are ids that no user may type: what is typed stays text. And as each
turn begins with all the turns before it, a cache of keys and values needs to be fed the new one
only.

Parent: none
New: everything

Read in this order: ChatTemplate (render, encode, stops), Chat (reply), talk.
"""

import contextlib
import importlib
import json
import sys
import time
from datetime import datetime
from pathlib import Path

import modern
import regex

from common import OUT, atomic

ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # end a turn or a text in most vocabularies
THOUGHTS = ("<think>", "</think>")  # what a template may look for in the model's own messages
# For a base model, which has no template: a transcript, as it has read many.
TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: "
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
HELP = """/reset         forget the conversation
/save [path]   write it as JSON
/help          this list
/quit, Ctrl-D  leave
Ctrl-C         stop an answer"""


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


class Chat:
    """A conversation with a model. `messages` is all of it; `dropped`, how many of the oldest turns
    no longer fitted into the context at the last reply; `drawn`, how many tokens that took."""

    def __init__(self, model, tokenizer, directory=None, system=None):
        self.model, self.tokenizer, self.template = model, tokenizer, ChatTemplate(directory)
        self.stops = self.template.stops(tokenizer)
        self.system = [{"role": "system", "content": system}] if system else []
        weight = model.token_embedding.weight
        self.cache = modern.KVCache(model.config, device=weight.device, dtype=weight.dtype)
        self.reset()

    def reset(self):
        """Forget everything but the system message."""
        self.messages, self.tokens, self.drawn, self.dropped = [*self.system], [], 0, 0
        self.first = len(self.system)  # where the turns begin that still fit
        self.cache.length = 0

    def fit(self, messages, max_new_tokens):
        """The ids of a prompt that leaves room for max_new_tokens or a quarter of the context, with
        the oldest turns left out. Raises ValueError where the last message alone is too long."""
        context, first, dropped = self.model.config.context_length, self.first, 0
        room = context - min(max_new_tokens, context // 4)
        while True:
            kept = [*self.system, *messages[first:]]
            if len(ids := self.template.encode(kept, self.tokenizer)) <= room:
                self.first, self.dropped = first, dropped
                return ids
            users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > first]
            if not users:
                raise ValueError(f"{len(ids)} tokens do not fit into {room} of {context}: say less")
            first, dropped = users[0], dropped + 1

    def reply(self, text, max_new_tokens=512, **settings):
        """Yield the answer to `text` piece by piece, in whole characters. What was said when it is
        interrupted or closed counts as the answer. `settings` are those of modern.stream_text.

        Raises ValueError where text is too long, and the conversation is as before."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.fit(messages, max_new_tokens)
        # The cache holds what was fed before: where this begins alike, only the rest is new. At
        # least one token has to be, as its logits give the first of the answer.
        pairs = enumerate(zip(self.tokens, ids[:-1]))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(self.tokens), len(ids) - 1))
        self.cache.length, self.tokens, self.drawn = shared, ids, 0
        whole, answer = shared, ""  # whole: tokens that are in the cache in every layer

        def on_token(token):
            nonlocal whole
            whole, self.drawn = self.cache.length, self.drawn + 1
            self.tokens.append(token)

        settings |= {"stop": self.template.stop, "stop_tokens": self.stops, "on_token": on_token}
        most = min(max_new_tokens, self.model.config.context_length - len(ids))
        rest = (self.model, self.tokenizer, ids[shared:], most)
        try:
            for piece in modern.stream_text(*rest, cache=self.cache, **settings):
                answer += piece
                yield piece
        except Exception:
            messages = None  # a bug or no memory, not an interruption: as if nothing was said
            raise
        finally:  # also for KeyboardInterrupt and GeneratorExit
            if messages:
                answer = answer.strip() if self.template.plain else answer
                self.messages = [*messages, {"role": "assistant", "content": answer}]
            self.cache.length = min(whole, self.cache.length)
            self.tokens = self.tokens[: self.cache.length]

    def save(self, path):
        """Write the messages as JSON; the file appears whole or not at all."""
        with atomic(path, "w") as file:
            json.dump(self.messages, file, indent=1)


def talk(chat, settings, input=input, out=None):
    """The loop of the terminal: read a line, print the answer as it comes; /help lists the rest.

    Returns at the end of the input or at /quit; a second Ctrl-C at the prompt exits with 130."""
    out = out or sys.stdout
    dim, normal = ("\033[2m", "\033[0m") if out.isatty() else ("", "")
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() a history, and keys that edit

    def say(text):
        print(f"{dim}{text}{normal}", file=out, flush=True)

    if chat.template.plain:
        say("no chat template here, so a base model: it goes on with a transcript")
    say("/help lists the commands")
    warned = False
    while True:
        try:
            line = input("> " if out.isatty() else "").strip()
            warned = False
        except EOFError:
            return print(file=out)
        except KeyboardInterrupt:
            if warned:
                sys.exit(130)
            warned = True
            say("\nCtrl-C once more, /quit or Ctrl-D leaves")
            continue
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            chat.reset()
            say("a new conversation")
        elif command == "/help":
            say(HELP)
        elif command == "/save":
            name = OUT / "04_modern" / f"chat-{datetime.now():%Y%m%d-%H%M%S}.json"
            try:
                chat.save(path := Path(argument.strip() or name).expanduser())
                say(f"{len(chat.messages)} messages are in {path}")
            except OSError as error:
                say(f"not saved: {error}")
        elif regex.fullmatch(r"/\w*", command):
            say(f"there is no {command}: /help lists the commands")
        elif line:
            answer(chat, line, settings, out, say)


def answer(chat, line, settings, out, say):
    """Print one answer as it comes, then how long it took. Ctrl-C ends it."""
    began = time.perf_counter()
    try:
        with contextlib.closing(chat.reply(line, **settings)) as pieces:
            for piece in pieces:
                print(piece, end="", file=out, flush=True)
        print(file=out)
    except KeyboardInterrupt:
        say("\nstopped")
    except ValueError as error:
        return say(f"error: {error}")
    seconds = time.perf_counter() - began
    note = f"{chat.drawn} tokens, {chat.drawn / seconds:.1f} tokens/s"
    if chat.dropped:
        note += f"; the context is full: the oldest turns are dropped ({chat.dropped} now)"
    say(note)
