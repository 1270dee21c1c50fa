"""Chat formats: named ones, one record each (`templates`), and the tokenizer's own (`chat_templates`).

Both write a conversation as `Segment`s, which `vr_jax.data.conversations.ChatEncoder` turns into token ids and masks.
"""
