"""What other servers answer and this one does not: said by name, rather than that there is nothing here."""

from __future__ import annotations

_TEXT = "this server generates text, and has no"
_STATELESS = "this server keeps nothing between requests, and has no"

_NO_TRACE = "this server was started without --trace FILE, which says where timelines are written"

_ASLEEP = "clients may not put this server to sleep: start it with --enable-sleep-mode"

_ABSENT = {
    "/start_profile": _NO_TRACE,
    "/stop_profile": _NO_TRACE,
    "/v1/embeddings": f"{_TEXT} embeddings",
    "/pooling": f"{_TEXT} pooled outputs",
    "/classify": f"{_TEXT} classification",
    "/v1/classify": f"{_TEXT} classification",
    "/score": f"{_TEXT} scores",
    "/v1/score": f"{_TEXT} scores",
    "/rerank": f"{_TEXT} ranking",
    "/v1/rerank": f"{_TEXT} ranking",
    "/v2/rerank": f"{_TEXT} ranking",
    "/v1/moderations": f"{_TEXT} moderation",
    "/v1/audio": f"{_TEXT} audio",
    "/v1/images": f"{_TEXT} images",
    "/v1/videos": f"{_TEXT} videos",
    "/v1/realtime": f"{_TEXT} realtime sessions",
    "/v1/responses": f"{_STATELESS} stored responses",
    "/v1/files": f"{_STATELESS} files",
    "/v1/uploads": f"{_STATELESS} files",
    "/v1/batches": f"{_STATELESS} batches",
    "/v1/vector_stores": f"{_STATELESS} vector stores",
    "/v1/conversations": f"{_STATELESS} conversations",
    "/v1/assistants": f"{_STATELESS} assistants",
    "/v1/threads": f"{_STATELESS} threads",
    "/v1/fine_tuning": "this server serves one model as it is, and does not train",
    "/v1/load_lora_adapter": "this server has no adapters: merge them into the weights",
    "/v1/unload_lora_adapter": "this server has no adapters: merge them into the weights",
    "/sleep": _ASLEEP,
    "/wake_up": _ASLEEP,
    "/is_sleeping": _ASLEEP,
    "/update_weights_from_disk": "clients may not change its weights: start it with --enable-weight-updates",
    "/v1/messages": "this server speaks OpenAI's API: use /v1/chat/completions",
}


def why_absent(path: str) -> str | None:
    """What to say of a path that other servers have, or have something below; None of any other one."""
    parts = path.split("/")
    beginnings = ("/".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((_ABSENT[beginning] for beginning in beginnings if beginning in _ABSENT), None)
