"""How a conversation is written down as text, as in 07: ChatML, Alpaca, or a model's own template.

Parent: 07_sft/templates.py
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
