"""The page in the browser: the one module that imports gradio.

Nothing is fetched from other hosts, and nothing is sent to any: gradio's analytics, its share links and its API pages
are off, and the fonts are those of the system. Answers and file names are shown as text, never as HTML or Markdown, so
that a model or a file cannot add elements or requests to the page.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from vr_jax.app.contract import Answer, PageOptions, Settings, Variant
from vr_jax.app.figure import figures_html
from vr_jax.app.models import ModelThread
from vr_jax.app.session import Session
from vr_jax.app.uploads import MAX_BYTES, UploadError, check_uploads
from vr_jax.errors import UserError
from vr_jax.inference import Sampling
from vr_jax.pages import showable

LENGTHS = (16, 64, 256, 512, 1024, 2048)  # each length is a program of its own, so a few are offered
NO_PRUNER = "none"
SECONDS_KEPT = 24 * 3600  # how long uploads and conversations are kept
VISITORS = 64  # the conversations that are kept at a time
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
STOPPED = "Stopped. An answer that is not whole is not part of the conversation."
EMPTY = "Write a question, with or without images."
# Longer texts fit no prompt, and the tokeniser would keep every other visitor waiting.
MAX_TEXT = 200_000  # characters
TOO_LONG = f"The question is too long; write at most {MAX_TEXT:,} characters."
NO_MAPS = "The heat maps of the next answer appear here."
HELP = (
    "Colours say how a vision token divides its attention over the patches of its own window: warm is more than "
    "uniform, cool is less. Point at the image for one token, click to keep it, press Escape for all."
)


@dataclass
class Talk:
    """The conversation of one visitor, and what the page shows of it.

    Attributes:
        session: The conversation.
        messages: The messages of each model, as gradio's Chatbot takes them.
    """

    session: Session
    messages: list[list[dict[str, Any]]] = field(default_factory=list)


def keep_uploads_in(folder: str | os.PathLike[str]) -> None:
    """Lets the pages of this process that are built from now on keep what is uploaded in a folder."""
    os.environ["GRADIO_TEMP_DIR"] = os.fspath(folder)


def launch(blocks: gr.Blocks, host: str, port: int | None, *, folder: str | os.PathLike[str]) -> str:
    """Serves a page from threads of this process.

    Args:
        blocks: The page.
        host: The address to listen at.
        port: The port, or None for the first free one from 7860.
        folder: The folder of the examples' images, the only one that the page may read beside what is uploaded. A
            browser shows every file below it as it is, HTML too, so that it must not hold what is uploaded.

    Returns:
        The page's address.

    Raises:
        UserError: Nothing can listen there.
        ValueError: The uploads lie below the folder.
    """
    uploads = os.environ.get("GRADIO_TEMP_DIR")
    if uploads and Path(uploads).resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{folder} is served as it is, but holds the uploads")
    # gradio asks the page itself once; a proxy for other hosts must not get that request.
    known = [os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")]
    os.environ["NO_PROXY"] = ",".join(dict.fromkeys(filter(None, [*known, "localhost", "127.0.0.1", "::1", host])))
    try:
        _, url, _ = blocks.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            max_file_size=MAX_BYTES,
            state_session_capacity=VISITORS,
            allowed_paths=[os.fspath(folder)],
            theme=_theme(),
            css=_text("page.css"),
            head=f"<script>{_text('page.js')}</script>",
        )
    except (OSError, ValueError) as error:
        wanted = f"{host}:{port}" if port else host
        raise UserError(
            f"no page can be served at {wanted} ({' '.join(str(error).split())[:200]}); choose another --port or --host"
        ) from error
    return str(url)


class Page:
    """The components of a page, and what they do.

    Attributes:
        blocks: The page as gradio serves it.
        box: The question with its images.
        chats: The answers of each model.
        numbers: The line of numbers of each model.
        figures: The heat maps of each model.
        status: The line that says what is wrong.
    """

    def __init__(self, thread: ModelThread, options: PageOptions):
        """Builds the page.

        Args:
            thread: Runs the models.
            options: What the page shows.
        """
        self.thread = thread
        self.options = options
        with gr.Blocks(title="vr-jax", analytics_enabled=False, delete_cache=(3600, SECONDS_KEPT)) as self.blocks:
            self.talk = gr.State(None, time_to_live=SECONDS_KEPT)
            gr.HTML(f"<h1>Ask about images</h1><p>{_names(options)}</p>", elem_id="vr-head")
            with gr.Row(elem_id="vr-main"):
                with gr.Column(scale=5, min_width=320):
                    self._conversation()
                with gr.Column(scale=4, min_width=320):
                    self._maps()
            self._events()

    def _conversation(self) -> None:
        """The answers of each model, the question, and the settings."""
        self.chats: list[gr.Chatbot] = []
        self.numbers: list[gr.HTML] = []
        with gr.Row(equal_height=True):
            for title in self.options.titles:
                with gr.Column(min_width=260):
                    self.chats.append(
                        gr.Chatbot(
                            label=title,
                            height=None,
                            min_height=240,
                            max_height=460,
                            render_markdown=False,
                            sanitize_html=True,
                            buttons=[],
                            feedback_options=None,
                            allow_file_downloads=False,
                            elem_id=f"vr-chat-{len(self.chats)}",
                            elem_classes="vr-chat",
                        )
                    )
                    self.numbers.append(
                        gr.HTML("", elem_id=f"vr-numbers-{len(self.numbers)}", elem_classes="vr-numbers")
                    )
        self.status = gr.HTML("", elem_id="vr-status")
        self.box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="A question. Drop, paste or choose images.",
            file_count="multiple",
            sources=["upload"],
            max_lines=6,
            elem_id="vr-box",
        )
        if self.options.examples:
            gr.Examples(
                [[{"text": one.question, "files": [one.image]}] for one in self.options.examples],
                inputs=[self.box],
                cache_examples=False,
                elem_id="vr-examples",
                api_visibility="private",
            )
        with gr.Row():
            self.anew = gr.Button("New conversation", size="sm")
        with gr.Accordion("Settings", open=False):
            self._settings()

    def _settings(self) -> None:
        chosen = self.options.settings
        lengths = sorted({*LENGTHS, chosen.max_new_tokens})
        with gr.Row():
            self.length = gr.Dropdown(lengths, value=chosen.max_new_tokens, label="Longest answer, in tokens")
            self.temperature = gr.Slider(
                0, 2, value=chosen.sampling.temperature, step=0.05, label="Temperature (0 is greedy)"
            )
        with gr.Row():
            self.top_p = gr.Slider(0.05, 1, value=chosen.sampling.top_p, step=0.05, label="Top p")
            self.seed = gr.Number(chosen.sampling.seed, precision=0, minimum=0, label="Seed of random draws")
        self.pruners = []
        with gr.Row():
            for one, variant in zip(self.options.checkpoints, chosen.variants, strict=True):
                self.pruners.append(
                    gr.Dropdown(
                        [NO_PRUNER, *one.pruners],
                        value=variant.pruning or NO_PRUNER,
                        label="Pruner" if len(chosen.variants) == 1 else f"Pruner of {one.title}",
                        info=one.pruner_note,
                        interactive=bool(one.pruners),
                    )
                )
        half = all(one.dtype == "bfloat16" for one in chosen.variants)
        self.half = gr.Checkbox(half, label="Compute in bfloat16, which loads the models anew")
        self.maps = gr.Checkbox(chosen.maps, label="Heat maps, which take one more forward pass")
        self.overview = gr.Checkbox(chosen.overview, label="Heat maps over the overview instead of the tiles")

    def _maps(self) -> None:
        """What each model re-read."""
        gr.HTML(f"<h2>What Vision Remember re-read</h2><p>{HELP}</p>", elem_classes="vr-title")
        self.figures = [
            gr.HTML(self._maps_of(number, _line(NO_MAPS)), elem_id=f"vr-maps-{number}", elem_classes="vr-figures")
            for number in range(len(self.options.titles))
        ]

    def _maps_of(self, number: int, content: str) -> str:
        """The maps of a model, under its name where there are two."""
        several = len(self.options.titles) > 1
        return (f"<h3>{_escaped(self.options.titles[number])}</h3>" if several else "") + content

    def _events(self) -> None:
        controls = [self.length, self.temperature, self.top_p, self.seed, self.half, self.maps, self.overview]
        shown = [self.box, self.talk, self.status, *self.chats, *self.numbers, *self.figures]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asked = self.box.submit(self.ask, [self.box, self.talk, *controls, *self.pruners], shown, **private)
        self.box.stop(self.stopped, None, [self.box, self.status, *self.numbers], cancels=[asked], **private)
        self.anew.click(self.forget, None, shown, cancels=[asked], **private)

    def ask(self, message: dict[str, Any] | None, talk: Talk | None, *values: Any) -> Iterator[dict[Any, Any]]:
        """Asks the question of the box.

        Args:
            message: The text of the box and the paths of its files.
            talk: The conversation so far; None before the first question.
            *values: The values of the settings, in the order of `_chosen`.

        Yields:
            What changes on the page.
        """
        text, files = (message or {}).get("text") or "", (message or {}).get("files") or []
        try:
            if not text.strip():
                raise UserError(EMPTY)
            if len(text) > MAX_TEXT:
                raise UserError(TOO_LONG)
            settings = self._chosen(*values)
            uploads = check_uploads(files)
        except UserError as error:
            kept = list(error.usable) if isinstance(error, UploadError) else files
            yield {
                self.box: gr.update(value={"text": text, "files": kept}),
                self.status: _line(str(error), "alert"),
            }
            return
        talk = talk or Talk(Session(self.thread), [[] for _ in self.options.titles])
        asked = [*({"role": "user", "content": {"path": file}} for file in files), _message("user", text)]
        before = [list(one) for one in talk.messages]
        yield {
            self.box: gr.update(value=None, submit_btn=False, stop_btn="Stop"),
            self.status: "",
            **{chat: [*one, *asked] for chat, one in zip(self.chats, before, strict=True)},
            **dict.fromkeys(self.numbers, ""),
        }
        problems = []
        for number, answer in talk.session.ask(text, uploads, settings):
            if answer.problem:
                problems.append(f"{self.options.titles[number]}: {answer.problem}")
            messages = [*before[number], *asked, _message("assistant", answer.text or "\u2026")]
            if answer.whole:
                talk.messages[number] = messages
            yield {
                self.talk: talk,
                self.chats[number]: talk.messages[number] if answer.problem else messages,
                self.numbers[number]: _numbers(answer),
                self.status: _line("; ".join(problems), "alert"),
                **(self._maps_after(number, answer) if answer.done and not answer.problem else {}),
            }
        unasked = len(problems) == len(self.options.titles)
        # A next question may be in the box already.
        again: dict[str, Any] = {"value": {"text": text, "files": files}} if unasked else {}
        yield {self.box: gr.update(**again, submit_btn=True, stop_btn=False)}

    def _maps_after(self, number: int, answer: Answer) -> dict[Any, Any]:
        """What the maps of a model become after its answer."""
        if answer.figures is not None:
            return {self.figures[number]: self._maps_of(number, figures_html(answer.figures))}
        note = f"{answer.note[:1].upper()}{answer.note[1:]}." if answer.note else NO_MAPS
        return {self.figures[number]: self._maps_of(number, _line(note))}

    def _chosen(
        self, length: Any, temperature: Any, top_p: Any, seed: Any, half: Any, maps: Any, overview: Any, *pruners: Any
    ) -> Settings:
        """Returns the settings of the controls.

        Raises:
            UserError: A value is outside its range.
        """
        stored = [one.dtype if one.dtype != "bfloat16" else None for one in self.options.settings.variants]
        variants = tuple(
            Variant(None if pruner in (None, NO_PRUNER) else pruner, "bfloat16" if half else dtype)
            for pruner, dtype in zip(pruners, stored, strict=True)
        )
        sampling = Sampling(float(temperature or 0), float(top_p or 1), int(seed or 0))
        return Settings(int(length), sampling, variants, bool(maps), bool(overview))

    def stopped(self) -> dict[Any, Any]:
        """Returns what changes on the page when an answer is stopped."""
        return {
            self.box: gr.update(submit_btn=True, stop_btn=False),
            self.status: _line(STOPPED),
            **dict.fromkeys(self.numbers, ""),
        }

    def forget(self) -> dict[Any, Any]:
        """Returns what changes on the page when a new conversation begins."""
        return {
            self.box: gr.update(value=None, submit_btn=True, stop_btn=False),
            self.talk: None,
            self.status: "",
            **{chat: [] for chat in self.chats},
            **dict.fromkeys(self.numbers, ""),
            **{one: self._maps_of(number, _line(NO_MAPS)) for number, one in enumerate(self.figures)},
        }


def _theme() -> gr.themes.Base:
    """Returns gradio's own theme with the fonts of the system, and with grey texts that can be read."""
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=("ui-monospace", "monospace"))
    greys = ("block_info_text_color", "body_text_color_subdued", "input_placeholder_color")
    return theme.set(
        **dict.fromkeys(greys, "*neutral_500"), **dict.fromkeys([f"{name}_dark" for name in greys], "*neutral_400")
    )


def _names(options: PageOptions) -> str:
    return " and ".join(f"<b>{_escaped(title)}</b>" for title in options.titles)


def _numbers(answer: Answer) -> str:
    parts = [answer.stats.line()] if answer.stats else []
    return _line(" \u00b7 ".join([*parts, *([answer.note + "\u2026"] if answer.note and not answer.done else [])]))


def _message(role: str, text: str) -> dict[str, Any]:
    """A message of a Chatbot. Without Markdown it still shows HTML, so that the text is escaped here."""
    return {"role": role, "content": _escaped(text)}


def _line(text: str, role: str = "status") -> str:
    return f'<p role="{role}">{_escaped(text)}</p>' if text else ""


def _escaped(text: str) -> str:
    return html.escape(showable(text))


def _text(name: str) -> str:
    return (resources.files("vr_jax.app") / "templates" / name).read_text(encoding="utf-8")
