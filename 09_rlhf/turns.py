"""How a conversation is written down as text and as tokens, as in 07 and 08.

Parent: 08_reward/chats.py; 08_reward/reward.py (render_chat, protect, encode_text, encode_prompt,
    encode_reply); 07_sft/sft.py (stop_tokens)
"""

import importlib
import json
from datetime import datetime
from pathlib import Path

from common import EOT

ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # end a turn or a text in most vocabularies

# ---- formats written out


def chatml(messages, add_generation_prompt=False):
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return "".join(turns) + "<|im_start|>assistant\n" * add_generation_prompt


CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

ALPACA_TASK = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def alpaca(messages, add_generation_prompt=False):
    parts = [ALPACA_TASK] if not messages or messages[0]["role"] != "system" else []
    for m in messages:
        if m["role"] == "system":
            parts.append(m["content"])
        elif m["role"] == "user":
            parts.append(f"### Instruction:\n{m['content']}")
        else:
            parts.append(f"### Response:\n{m['content']}{EOT}")
    text = "\n\n".join(parts)
    return text + "\n\n### Response:\n" if add_generation_prompt else text


ALPACA = """\
{%- if messages[0].role != 'system' -%}{{- 'TASK' -}}{%- endif -%}
{%- for message in messages -%}
{%- if not loop.first or message.role != 'system' -%}{{- '\\n\\n' -}}{%- endif -%}
{%- if message.role == 'system' -%}{{- message.content -}}
{%- elif message.role == 'user' -%}{{- '### Instruction:\\n' + message.content -}}
{%- else -%}{{- '### Response:\\n' + message.content + '<|endoftext|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:\\n' -}}{%- endif -%}"""
ALPACA = ALPACA.replace("TASK", ALPACA_TASK)


def plain(messages, add_generation_prompt=False):
    turns = (m["content"] + (EOT if m["role"] == "assistant" else "\n\n") for m in messages)
    return "".join(turns)


class PlainTemplate:
    """chatml, alpaca, or plain: the words alone, as a base model might have read them.

    `specials` are the tokens that it writes, `end` the one that ends an answer, `source` is the
    same in Jinja. render: see ChatTemplate."""

    def __init__(self, name):
        self.render, self.source = dict(
            chatml=(chatml, CHATML), alpaca=(alpaca, ALPACA), plain=(plain, "")
        )[name]
        self.specials = ("<|im_start|>", "<|im_end|>") if name == "chatml" else (EOT,)
        self.name, self.end = name, self.specials[-1]


class ChatTemplate:
    """The template of a model directory: chat_template.jinja or that in tokenizer_config.json, and
    `end`, the token that ends an answer: the first of ENDS that it writes, or else eos_token.

    Raises ValueError where there is none, for a file that cannot be read, for a template that is
    not Jinja or has no end."""

    name, specials = "own", ()  # the tokenizer has its tokens already

    def __init__(self, directory):
        names = ("tokenizer_config.json", "chat_template.jinja")
        try:
            paths = [Path(directory, name) for name in names]
            texts = {p.name: p.read_text(encoding="utf-8") for p in paths if p.exists()}
            config = json.loads(texts.get(names[0], "{}"))
            self.source = texts.get(names[1]) or config.get("chat_template")
            if isinstance(self.source, list):  # several with names, for tools or retrieval
                named = {entry["name"]: entry["template"] for entry in self.source}
                self.source = named.get("default") or next(iter(named.values()))
            texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items()}
            self.special = {
                k: v for k, v in texts.items() if k.endswith("_token") and isinstance(v, str)
            }
            written = [end for end in ENDS if end in (self.source or "")]
            self.end = (written or [self.special.get("eos_token")])[0]
            self.template = environment().from_string(self.source or "")
        except ImportError:
            raise
        except Exception as error:  # whatever is wrong with the files
            raise ValueError(f"{directory} has no whole chat template: {error!r}") from None
        if not self.source or not self.end:
            raise ValueError(f"{directory} has no chat template: give --template chatml or alpaca")

    def render(self, messages, add_generation_prompt=False):
        """The text of a list of {"role": ..., "content": ...}; with add_generation_prompt it ends
        where the assistant begins. Raises ValueError where the template refuses or fails."""
        try:
            prompt = {"add_generation_prompt": add_generation_prompt, "tools": None}
            return self.template.render(self.special | prompt, messages=messages, documents=None)
        except Exception as error:  # a stranger's code can raise anything
            raise ValueError(f"the chat template failed: {error}") from None


def choose(name, directory=None):
    """The template called chatml, alpaca, plain or own (that of a model directory); auto is the
    model's own where it has one, else chatml. One of the model's own that is ChatML or Alpaca as
    written here needs no Jinja. ValueError for another name, or no own template."""
    if name not in ("auto", "own", "chatml", "alpaca", "plain"):
        raise ValueError(f"--template {name} is none of auto, own, chatml, alpaca and plain")
    if name in ("auto", "own") and directory is not None:
        path = Path(directory) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        jinja = (Path(directory) / "chat_template.jinja").exists()
        for known, source in (("chatml", CHATML), ("alpaca", ALPACA)):
            if config.get("chat_template") == source and not jinja:
                return PlainTemplate(known)
        if name == "own" or jinja or config.get("chat_template"):
            return ChatTemplate(directory)
    if name == "own":
        raise ValueError("there is no model, so no template of its own: give chatml or alpaca")
    return PlainTemplate("chatml" if name == "auto" else name)


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


# ---- tokens


def render_chat(messages, template, add_generation_prompt=False):
    """The text of a conversation in parts, [(text, learned), ...]: learned are the assistant's
    words and the token that ends them, not the frame around. With add_generation_prompt it ends
    where the assistant begins.

    messages: [{"role": "system", "user" or "assistant", "content": str}, ...]. What a template
    writes for an answer is what comes to the text when the answer does. Raises ValueError where it
    then rewrites what was there before.

    [user Hi, assistant Ho] in ChatML -> [
    ("<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n", False),
    ("Ho<|im_end|>", True), ("\\n", False)]"""
    parts, done = [], ""

    def rest(text):
        if not text.startswith(done):
            raise ValueError(
                "the chat template rewrites earlier turns when later ones come: train on "
                "conversations of one answer, or with --template chatml"
            )
        return text[len(done) :]

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            parts.append((rest(template.render(messages[:i], True)), False))
            done += parts[-1][0]
            said = rest(template.render(messages[: i + 1]))
            end = said.rfind(template.end)
            said = said if end < 0 else said[: end + len(template.end)]
            parts.append((said, True))
            done += said
    parts.append((rest(template.render(messages, add_generation_prompt)), False))
    return [(text, learned) for text, learned in parts if text]


def protect(messages, tokenizer):
    """(messages, mark): a mark inside each name of a special token that somebody typed, so that it
    stays text; only the template writes the tokens themselves."""
    said = "".join(m["content"] for m in messages)
    mark = next(chr(c) for c in range(0xE000, 0xF900) if chr(c) not in said)
    names, safe = [name for name in tokenizer.special if len(name.strip()) > 1], []
    for message in messages:
        content = message["content"]
        for name in names:
            content = content.replace(name, name[:1] + mark + name[1:])
        safe.append(message | dict(content=content))
    return safe, mark


def encode_text(text, tokenizer, mark):
    """Ids of a rendered text in which `mark` protects what is no special token."""
    ids, special = [], tokenizer.special
    for part in tokenizer.special_pattern.split(text):
        words = part.replace(mark, "")
        ids += [special[part]] if part in special else tokenizer.encode(words, special=False)
    return ids


def encode_prompt(messages, tokenizer, template):
    """Ids of a conversation up to where the assistant's next answer begins."""
    safe, mark = protect(messages, tokenizer)
    parts = render_chat(safe, template, add_generation_prompt=True)
    return [token for text, _ in parts for token in encode_text(text, tokenizer, mark)]


def encode_reply(messages, tokenizer, template):
    """Ids of the last message of a conversation, an answer, and of the token that ends it."""
    safe, mark = protect(messages, tokenizer)
    said = [text for text, learned in render_chat(safe, template) if learned]
    return encode_text(said[-1], tokenizer, mark)


def stop_tokens(model, tokenizer, template):
    """The ids that end an answer: the template's, the end of text, and what the model names."""
    found = {tokenizer.special[n] for n in (template.end, EOT) if n in tokenizer.special}
    named = model.token_ids.get("eos_token_id")
    return found | set(named if isinstance(named, list) else [named]) - {None}
