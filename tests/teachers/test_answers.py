"""What is read in an endpoint's response before anything of it is stored."""

import httpx
import pytest

from llmdistill.teachers.answers import refused_prompt


@pytest.mark.parametrize(
    ("status", "error", "why"),
    [
        (400, {"type": "invalid_request_error", "message": "Output blocked by content filtering policy"},
         "content filtering policy"),  # Anthropic
        (400, {"code": "invalid_request_error", "type": "invalid_request_error", "message": "Content Exists Risk"},
         "content exists risk"),  # DeepSeek
        (400, {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."},
         "data_inspection_failed"),  # DashScope
        (400, {"code": "DataInspectionFailed", "message": "Input data may contain inappropriate content."},
         "inappropriate content"),
        (400, {"code": "content_policy_violation", "message": "Rejected by the safety system."}, "content_policy_violation"),
        (400, {"code": 400, "type": "exceed_context_size_error", "message": "too large"},
         "exceed_context_size_error"),  # llama.cpp
        (400, {"code": 400, "message": "the request exceeds the available context size"}, "exceeds the available context size"),
        (403, {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["violence"], "flagged_input": "…"}},
         "moderation"),  # OpenRouter
        (403, {"code": 403, "message": "Key limit exceeded"}, None),
        (403, {"code": "content_filter", "message": "This key may not"}, None),
        (400, {"code": 400, "type": "invalid_request_error", "message": "Unknown model"}, None),
        (400, "no", None),
        (404, {"code": "content_filter", "message": "no"}, None),
    ],
)  # fmt: skip
def test_a_refusal_of_one_prompt_is_told_from_that_of_all(status, error, why):
    found = refused_prompt(httpx.Response(status, json={"error": error}))
    assert found == (why and f"a refusal of the prompt ({why})")
