"""Answers questions about images: sampling, batched generation with a static cache, streaming, conversations."""

from vr_jax.inference.batch_answers import Question, Summary, answer_file, answers, read_questions
from vr_jax.inference.buckets import Buckets, PromptTooLong
from vr_jax.inference.chat import Chat
from vr_jax.inference.generator import STOP_TOKENS, Generator, Program
from vr_jax.inference.loading import Loaded, load_for_inference, load_processor, with_penalty, with_pruning
from vr_jax.inference.memory import memory_errors
from vr_jax.inference.prompts import PromptError, question, user_turn
from vr_jax.inference.sampling import Sampling
from vr_jax.inference.state import DecodeState, PromptBatch, Reply, lay_out, on_devices
from vr_jax.inference.streaming import Piece, TextStream, decode_text
from vr_jax.inference.unstacked import unstacked_model, unstacks

__all__ = [
    "STOP_TOKENS",
    "Buckets",
    "Chat",
    "DecodeState",
    "Generator",
    "Loaded",
    "Piece",
    "Program",
    "PromptBatch",
    "PromptError",
    "PromptTooLong",
    "Question",
    "Reply",
    "Sampling",
    "Summary",
    "TextStream",
    "answer_file",
    "answers",
    "decode_text",
    "lay_out",
    "load_for_inference",
    "load_processor",
    "memory_errors",
    "on_devices",
    "question",
    "read_questions",
    "unstacked_model",
    "unstacks",
    "user_turn",
    "with_penalty",
    "with_pruning",
]
