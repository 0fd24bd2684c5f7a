"""The engine for servers with OpenAI's chat API, such as `vllm serve`."""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from ..errors import UserError
from .chat_templates import Chat
from .engines import RESUME, Job, Settings, check_texts, package_versions
from .generations import Generation

# Statuses that concern one request, not all: a prompt that is too long, or content that is not accepted.
REFUSED = (400, 413, 422)
# Statuses for a field that the server does not know or accept.
FIELD_REFUSED = (400, 422)
# Fields that `vllm serve` would take from the model's generation_config.json if a request did not set them; other
# servers may not know all of them. For top_k, -1 means no limit, in old versions of vLLM as well.
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_k": -1, "min_p": 0.0}


class OpenAIEngine:
    """A server with the chat API, such as `vllm serve`, which serves adapters as models by their names."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.not_taken: frozenset[str] = frozenset()

    def check(self, chats: list[Chat]) -> None:
        """Check the texts; the server itself checks the context length and the chat template."""
        check_texts(chats)

    def refusal(self, chat: Chat, number: int) -> str | None:
        try:
            check_texts([chat], number)
        except UserError as error:
            return str(error)
        return None

    def versions(self) -> dict[str, str]:
        from openai import OpenAIError

        try:
            served = [model.id for model in self._client().models.list()]
        except OpenAIError as error:
            raise UserError(self._sentence(error)) from error
        for name in (self.settings.model, *self.settings.adapters):
            if name not in served:
                raise UserError(f"The server serves {', '.join(served)}, not {name}: write one of these names.")
        return package_versions("openai")

    def parameters(self) -> dict[str, Any]:
        sampling = {**NEUTRAL, **vars(self.settings.sampling)}
        return {**sampling, "return_token_ids": True, **self._template_arguments()}

    def optional_fields(self) -> set[str]:
        """Fields to leave out if the server does not accept them: neutral ones, and `max_tokens`, which is renamed."""
        neutral = {name for name, value in NEUTRAL.items() if self.parameters()[name] == value}
        return {"max_tokens", "seed", "return_token_ids", *neutral}

    def _template_arguments(self) -> dict[str, Any]:
        arguments = self.settings.chat_template_kwargs
        return {"chat_template_kwargs": arguments} if arguments else {}

    def _client(self) -> Any:
        """A client that retries, with growing pauses, after 408, 409, 429, 5xx and lost connections."""
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY", "none")
        return OpenAI(base_url=self.settings.base_url, api_key=key, max_retries=5, timeout=3600)

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
        from openai import OpenAIError

        client = self._client()
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            futures = {pool.submit(self._reply, client, job): job for job in jobs}
            failure: OpenAIError | None = None
            pending = set(futures)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        reply = future.result()
                    except OpenAIError as error:
                        failure = failure or error
                    else:
                        yield futures[future], reply
                if failure is not None:  # cancel queued requests, but keep those in flight
                    pending = {future for future in pending if not future.cancel()}
        finally:
            pool.shutdown(cancel_futures=True)  # also if the caller stops early
        if failure is not None:
            raise UserError(self._sentence(failure)) from failure

    def _reply(self, client: Any, job: Job) -> Generation:
        from openai import APIStatusError

        try:
            return self._ask(client, job)
        except APIStatusError as error:
            if error.status_code not in REFUSED:
                raise
            return Generation(job.index, "", None, None, refused=str(error))

    def _ask(self, client: Any, job: Job) -> Generation:
        """One answer. Fields that the server rejects by name are left out, later too if it answers without them."""
        from openai import APIStatusError

        left_out = self.not_taken
        while True:
            try:
                answer = first_choice(
                    client.chat.completions.create(
                        model=job.run if job.run in self.settings.adapters else self.settings.model,
                        messages=job.messages,
                        extra_body=self._fields(job, left_out),
                    )
                )
                break
            except APIStatusError as error:
                named = {field for field in self.optional_fields() if field in str(error)} - left_out
                if error.status_code not in FIELD_REFUSED or not named:
                    raise
                left_out |= named
        self.not_taken |= left_out
        text, ids = answer.message.content or "", getattr(answer, "token_ids", None)
        return Generation(job.index, text, ids, answer.finish_reason, left_out=tuple(sorted(left_out)))

    def _fields(self, job: Job, left_out: frozenset[str]) -> dict[str, Any]:
        """The parameters to send; reasoning models need `max_completion_tokens` instead of `max_tokens`."""
        fields = {name: value for name, value in job.seeded(self.parameters()).items() if name not in left_out}
        limit = {"max_completion_tokens": self.settings.sampling.max_tokens} if "max_tokens" in left_out else {}
        return {**fields, **limit}

    def _sentence(self, error: Exception) -> str:
        """The error message: what happened and what to do, by status."""
        url, status = self.settings.base_url, getattr(error, "status_code", None)
        if status in (401, 403):
            return (
                f"The server at {url} rejects the API key ({error}): set OPENAI_API_KEY to one that may use this model."
            )
        if status == 404:
            return f"The server at {url} does not have this model or path ({error}): correct the model or --base-url."
        if status is None or status in (408, 409, 429) or status >= 500:
            return f"The server at {url} does not answer ({error}): start it, wait, or change --base-url; {RESUME}."
        return f"The server at {url} rejects the requests ({error}): fix that; {RESUME}."


def first_choice(reply: Any) -> Any:
    """The first answer in a reply.

    Raises:
        OpenAIError: if there is none, as when a server reports an error with status 200.
    """
    from openai import OpenAIError

    if not getattr(reply, "choices", None):
        raise OpenAIError(f"its reply contains no answer: {str(reply)[:500]}")
    return reply.choices[0]
