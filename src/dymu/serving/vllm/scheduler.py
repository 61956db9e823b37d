"""A scheduler that never ends a chunk of a prompt within an image."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler


class WholeImages(Scheduler):
    """vLLM's own keeps images whole, but for one that comes next, or whose beginning was found in the prefix cache."""

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        end = num_computed_tokens + num_new_tokens
        for feature in request.mm_features or ():
            first = feature.mm_position.offset
            if first <= num_computed_tokens and end < first + feature.mm_position.length:
                return [], 0, encoder_compute_budget, [], []
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
        )
